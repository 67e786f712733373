"""RandAugment: every operation against a slow loop from its definition, or against Pillow."""

import math

import numpy as np
import pytest

from jaxlocal.data import RandAugment
from jaxlocal.data.randaugment import OPERATIONS, _operations, apply_operation
from jaxlocal.errors import ConfigurationError

Image = pytest.importorskip("PIL.Image")


def image_of(channels=3, seed=0, shape=(7, 9)):
    low, high = (20, 200)  # so that there is a contrast to stretch
    return np.random.default_rng(seed).integers(low, high, (*shape, channels), np.uint8)


def applied(name, pixels, magnitude, opposite=False):
    grey = pixels.shape[-1] == 1
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    return np.asarray(apply_operation(name, image, magnitude, opposite)).reshape(pixels.shape)


def grey_of(pixels):
    if pixels.shape[-1] == 1:
        return pixels.astype(float)
    weights = np.array([0.299, 0.587, 0.114])
    return np.floor((pixels * weights).sum(-1, keepdims=True) + 0.5)


def blended(pixels, towards, factor):
    return np.clip(towards + factor * (pixels.astype(float) - towards), 0, 255)


def smoothed(pixels):
    """Pillow's smooth filter, [[1 1 1] [1 5 1] [1 1 1]] / 13; the edges are left."""
    out = pixels.astype(float)
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    for y in range(1, pixels.shape[0] - 1):
        for x in range(1, pixels.shape[1] - 1):
            window = pixels[y - 1 : y + 2, x - 1 : x + 2].astype(float)
            out[y, x] = np.floor((window * kernel[..., None]).sum((0, 1)) + 0.5)
    return out


def stretched(pixels):
    """Each channel from its least and largest value to 0 … 255."""
    out = np.empty(pixels.shape)
    for channel in range(pixels.shape[-1]):
        values = pixels[..., channel].astype(float)
        out[..., channel] = (values - values.min()) * 255 / (values.max() - values.min())
    return out


def mapped(pixels, source):
    """The pixel at source(y, x) for each, rounded down from its centre; grey outside."""
    height, width, _ = pixels.shape
    out = np.full(pixels.shape, 128.0)
    for y in range(height):
        for x in range(width):
            v, h = (math.floor(at) for at in source(y + 0.5, x + 0.5))
            if 0 <= v < height and 0 <= h < width:
                out[y, x] = pixels[v, h]
    return out


def rotated(pixels, degrees):
    """Against the clock around the centre."""
    middle_y, middle_x = pixels.shape[0] / 2, pixels.shape[1] / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def source(y, x):
        y, x = y - middle_y, x - middle_x
        return middle_y + sin * x + cos * y, middle_x + cos * x - sin * y

    return mapped(pixels, source)


def equalized(pixels):
    """The cumulative histogram of each channel, in whole steps as Pillow has it."""
    out = np.empty(pixels.shape)
    for channel in range(pixels.shape[-1]):
        counts = np.bincount(pixels[..., channel].ravel(), minlength=256)
        filled = counts[counts > 0]
        step = (filled.sum() - filled[-1]) // 255
        before = np.concatenate([[0], np.cumsum(counts)[:-1]])
        table = np.arange(256) if step == 0 else np.minimum((step // 2 + before) // step, 255)
        out[..., channel] = table[pixels[..., channel]]
    return out


REFERENCES = {
    "identity": lambda p, s, signed: p,
    "autocontrast": lambda p, s, signed: stretched(p),
    "equalize": lambda p, s, signed: equalized(p),
    "rotate": lambda p, s, signed: rotated(p, 30 * signed),
    "solarize": lambda p, s, signed: np.where(p >= max(0, round(256 * (1 - s))), 255 - p, p),
    "colour": lambda p, s, signed: blended(p, grey_of(p), max(0, 1 + 0.9 * signed)),
    "posterize": lambda p, s, signed: p >> (b := 8 - max(1, 8 - round(4 * s))) << b,
    "contrast": lambda p, s, signed: blended(
        p, math.floor(grey_of(p).mean() + 0.5), max(0, 1 + 0.9 * signed)
    ),
    "brightness": lambda p, s, signed: blended(p, 0, max(0, 1 + 0.9 * signed)),
    "sharpness": lambda p, s, signed: blended(p, smoothed(p), max(0, 1 + 0.9 * signed)),
    "shear_x": lambda p, s, signed: mapped(p, lambda y, x: (y, x + 0.3 * signed * y)),
    "shear_y": lambda p, s, signed: mapped(p, lambda y, x: (y + 0.3 * signed * x, x)),
    "translate_x": lambda p, s, signed: mapped(p, lambda y, x: (y, x + 0.45 * signed * p.shape[1])),
    "translate_y": lambda p, s, signed: mapped(p, lambda y, x: (y + 0.45 * signed * p.shape[0], x)),
}
EXACT = {"identity", "equalize", "solarize", "posterize"}


def test_there_are_the_fourteen_operations_of_the_paper():
    assert set(REFERENCES) == set(OPERATIONS) == set(_operations()) and len(OPERATIONS) == 14


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude, opposite", [(0, False), (3, True), (7, False), (10, True)])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_operation_is_that_of_its_definition(name, magnitude, opposite, channels):
    pixels = image_of(channels, seed=magnitude, shape=(40, 30) if name == "equalize" else (7, 9))
    strength = magnitude / 10
    expected = REFERENCES[name](pixels, strength, -strength if opposite else strength)
    got = applied(name, pixels, magnitude, opposite)
    assert got.dtype == np.uint8
    # Pillow cuts fractions off, and rounds what it blends with: one level.
    assert abs(got.astype(float) - expected).max() <= (0 if name in EXACT else 1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_magnitudes_up_to_thirty_are_images(name):
    for opposite in (False, True):
        assert applied(name, image_of(), 30, opposite).shape == (7, 9, 3)


def test_it_applies_the_drawn_operations_in_their_order():
    augmentation = RandAugment(operations=3, magnitude=8)
    images = np.stack([image_of(seed=seed) for seed in range(12)])
    draws = {k: v[0, 0, 0] for k, v in augmentation.draw(0, 0, 1, 1, 1, 12).items()}
    result = augmentation.apply_on_host(images, draws)
    for image, numbers, opposite, got in zip(
        images, draws["operation"], draws["opposite"], result, strict=True
    ):
        for number, negative in zip(numbers, opposite, strict=True):
            image = applied(OPERATIONS[number], image, 8, bool(negative))
        np.testing.assert_array_equal(got, image)


def test_operations_and_signs_are_uniform():
    draws = RandAugment(2).draw(0, 0, 70, 1, 4, 100)
    counts = np.bincount(draws["operation"].ravel(), minlength=14)
    # 56,000 draws: 4,000 of each, five deviations of sqrt(n p (1 - p)).
    assert len(counts) == 14 and abs(counts - 4000).max() < 5 * np.sqrt(56_000 * 13 / 14**2)
    assert abs(draws["opposite"].mean() - 0.5) < 5 * np.sqrt(0.25 / 56_000)


def test_the_device_and_a_missing_package_are_errors(monkeypatch):
    augmentation = RandAugment()
    draws = {k: v[0, 0, 0] for k, v in augmentation.draw(0, 0, 1, 1, 1, 1).items()}
    with pytest.raises(ConfigurationError, match="computed where images are read, by a stream"):
        augmentation.apply(image_of()[None], draws)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"needs Pillow, .*jaxlocal\[experiments\]"):
        RandAugment()
