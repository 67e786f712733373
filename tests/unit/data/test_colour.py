"""Colour jitter and PCA noise, against slow float64 loops and against Pillow."""

import numpy as np
import pytest

from jaxlocal.data import ColourJitter, PcaNoise

Image = pytest.importorskip("PIL.Image")
ImageEnhance = pytest.importorskip("PIL.ImageEnhance")

BRIGHTNESS, CONTRAST, SATURATION = range(3)


def images_of(shape, seed=0):
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def rounded(value):
    """Half goes up, as in integers."""
    return np.floor(value + 0.5)


def jittered(image, kinds, factors):
    """One image, from the definition in float64."""
    pixels = image.astype(np.float64)
    for kind, factor in zip(kinds, factors, strict=True):
        grey = pixels
        if pixels.shape[-1] == 3:
            weights = np.array([19595, 38470, 7471]) / 2**16  # 0.299, 0.587, 0.114 in 16 bits
            grey = rounded((pixels * weights).sum(-1, keepdims=True))
        towards = {BRIGHTNESS: 0.0, CONTRAST: rounded(grey.mean()), SATURATION: grey}[kind]
        pixels = np.clip(rounded(towards + factor * (pixels - towards)), 0, 255)
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_that_of_the_definition(channels):
    augmentation, images = ColourJitter(0.8), images_of((40, 6, 5, channels))
    draws = {name: v[0, 0, 0] for name, v in augmentation.draw(0, 0, 1, 1, 1, 40).items()}
    result = augmentation.apply_on_host(images, draws)
    factors = draws["factor"] / 2**16
    for image, kinds, factor, got in zip(images, draws["kind"], factors, result, strict=True):
        np.testing.assert_array_equal(got, jittered(image, kinds.tolist(), factor))


@pytest.mark.parametrize(
    "kind, enhance",
    [
        (BRIGHTNESS, ImageEnhance.Brightness),
        (CONTRAST, ImageEnhance.Contrast),
        (SATURATION, ImageEnhance.Color),
    ],
)
@pytest.mark.parametrize("factor", [0.25, 0.6, 1.0, 1.75])
def test_jitter_is_that_of_pillow(kind, enhance, factor):
    image = images_of((9, 8, 3), seed=1)
    one = 1 << 16
    others = [other for other in range(3) if other != kind]
    draws = {
        "kind": np.array([kind, *others], np.int8),
        "factor": np.array([round(factor * one), one, one], np.int32),
    }
    got = ColourJitter(0.8).apply_on_host(image, draws).astype(int)
    expected = np.asarray(enhance(Image.fromarray(image)).enhance(factor)).astype(int)
    assert abs(got - expected).max() <= 1  # Pillow cuts fractions off
    assert factor != 1.0 or (got == image).all()


def test_factors_are_uniform_and_orders_too():
    draws = ColourJitter(0.4).draw(3, 0, 50, 1, 4, 100)
    factors, kinds = draws["factor"] / 2**16, draws["kind"].reshape(-1, 3)
    assert abs(factors - 1).max() <= 0.4 + 2**-17
    # 60,000 draws of U[0.6, 1.4] with the variance 0.64 / 12: five deviations of their mean.
    assert abs(factors.mean() - 1) < 5 * np.sqrt(0.64 / 12 / factors.size)
    np.testing.assert_allclose(factors.var(), 0.64 / 12, rtol=0.03)
    orders, counts = np.unique(kinds, axis=0, return_counts=True)
    assert len(orders) == 6 and abs(counts - 20_000 / 6).max() < 5 * np.sqrt(20_000 * 5 / 36)


def test_pca_noise_adds_multiples_of_the_principal_colours():
    """AlexNet's: the covariance of what is added is strength^2 V diag(lambda^2) V^T."""
    values = np.diag([55.46, 4.794, 1.148])
    vectors = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-3)
    augmentation = PcaNoise(0.5)
    draws = augmentation.draw(0, 0, 100, 1, 4, 100)
    noise = draws["noise"].reshape(-1, 3).astype(float)
    expected = 0.25 * vectors @ values**2 @ vectors.T + np.eye(3) / 12  # 1/12 of the rounding
    # 40,000 draws estimate a covariance to sqrt(2 / 40,000) = 0.7 % of the variances.
    np.testing.assert_allclose(np.cov(noise.T), expected, atol=0.03 * expected.max())
    images = images_of((5, 4, 6, 3))
    some = {"noise": draws["noise"].reshape(-1, 3)[:5]}
    for image, added, got in zip(
        images, some["noise"], augmentation.apply_on_host(images, some), strict=True
    ):
        np.testing.assert_array_equal(got, np.clip(image.astype(int) + added, 0, 255))
