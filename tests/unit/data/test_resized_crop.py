"""Random resized crops, against a float64 loop, against Pillow, and their windows."""

import numpy as np
import pytest

from jaxlocal.data import ResizedCrop
from jaxlocal.data.resized_crop import random_windows

ONE = 1 << 16


def images_of(shape, seed=0):
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def box(window, height, width):
    """The pixels of a window: top, left, height, width."""
    parts = np.asarray(window) / ONE
    rows, columns = (
        max(1, int(np.floor(part * side + 0.5)))
        for part, side in zip(parts[:2], (height, width), strict=True)
    )
    top = int(parts[2] * (height - rows + 1))
    return top, int(parts[3] * (width - columns + 1)), rows, columns


def resized(image, top, left, rows, columns):
    """Pixel by pixel in float64: linear interpolation between centres, edges held."""
    height, width, _ = image.shape
    out = np.empty(image.shape)
    window = image[top : top + rows, left : left + columns].astype(np.float64)
    for y in range(height):
        for x in range(width):
            v = np.clip((y + 0.5) * rows / height - 0.5, 0, rows - 1)
            h = np.clip((x + 0.5) * columns / width - 0.5, 0, columns - 1)
            up, across = int(v), int(h)
            down, right = min(up + 1, rows - 1), min(across + 1, columns - 1)
            v, h = v - up, h - across
            above = window[up, across] * (1 - h) + window[up, right] * h
            below = window[down, across] * (1 - h) + window[down, right] * h
            out[y, x] = above * (1 - v) + below * v
    return out


@pytest.mark.parametrize("shape", [(8, 8, 3), (5, 9, 1), (13, 4, 3), (1, 1, 3)])
def test_it_is_the_window_interpolated(shape):
    augmentation, images = ResizedCrop(0.1), images_of((20, *shape))
    draws = augmentation.draw(1, 0, 1, 1, 1, 20)["window"][0, 0, 0]
    result = augmentation.apply_on_host(images, {"window": draws})
    for image, window, got in zip(images, draws, result, strict=True):
        expected = resized(image, *box(window, *shape[:2]))
        # Weights in 2^-11 err by 2^-12 at each of two axes, 0.13 of a level; rounding by a half.
        assert abs(got - expected).max() < 0.5 + 2 * 255 / 2**12 + 1e-9


def test_it_is_that_of_pillow():
    Image = pytest.importorskip("PIL.Image")
    augmentation, images = ResizedCrop(0.2), images_of((20, 16, 16, 3), seed=2)
    draws = augmentation.draw(4, 0, 1, 1, 1, 20)["window"][0, 0, 0]
    result = augmentation.apply_on_host(images, {"window": draws})
    for image, window, got in zip(images, draws, result, strict=True):
        top, left, rows, columns = box(window, 16, 16)
        cut = Image.fromarray(image[top : top + rows, left : left + columns])
        expected = np.asarray(cut.resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
        assert abs(got.astype(int) - expected).max() <= 1


def test_the_whole_image_is_unchanged():
    image = images_of((7, 9, 3))
    whole = {"window": np.array([ONE, ONE, 0, 0], np.int32)}
    np.testing.assert_array_equal(ResizedCrop().apply_on_host(image, whole), image)


def test_windows_have_the_areas_ratios_and_places_of_the_definition():
    windows = random_windows(np.random.default_rng(0), 0.08, (40_000,))
    height, width, top, left = windows.T
    area, ratio = height * width, width / height
    assert area.min() >= 0.08 - 1e-12 and area.max() <= 1 and (windows[:, :2] <= 1).all()
    assert ratio.min() >= 0.75 - 1e-12 and ratio.max() <= 4 / 3 + 1e-12
    assert windows[:, 2:].min() >= 0 and windows[:, 2:].max() < 1
    # Below 0.75 every window fits, so there areas are uniform: those under 0.4 over those under
    # 0.72 are 0.32 / 0.64, within five deviations of 25,000 draws.
    assert abs((area < 0.4).sum() / (area < 0.72).sum() - 0.5) < 5 * np.sqrt(0.25 / 25_000)
    assert abs(np.log(ratio[area < 0.72])).mean() == pytest.approx(np.log(4 / 3) / 2, rel=0.02)
    for place in (top, left):
        assert abs(place.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 40_000)


@pytest.mark.parametrize("aspect", [0.1, 0.5, 1.0, 2.0, 10.0])
def test_windows_fit_images_of_every_aspect(aspect):
    height, width, top, left = random_windows(np.random.default_rng(1), 0.3, (2000,), aspect).T
    assert height.max() <= 1 and width.max() <= 1
    ratio = width * aspect / height
    assert ratio.min() >= 0.75 - 1e-9 and ratio.max() <= 4 / 3 + 1e-9
    if aspect in (0.1, 10.0):  # 0.3 of the area never fits: the largest window in the middle
        assert (np.maximum(height, width) == 1).all() and (top == 0.5).all()
        np.testing.assert_allclose(height * width, 0.1 * 4 / 3, rtol=1e-12)
