"""Random resized crops: a random window of an image, resized to a fixed size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data import seeds
from jaxlocal.data.augmentation import Augmentation, check_pixels
from jaxlocal.errors import ConfigurationError

_ATTEMPTS = 10
_LONGEST = 4 / 3  # aspect ratio of a window; the shortest is its inverse
_PLACE = 16  # windows are in units of 2^-16 of an image
_WEIGHT = 11  # weights of an interpolation are multiples of 2^-11: 255 * 2^22 fits int32
_LARGEST_SIDE = 1 << 14  # beyond it, places of pixels do not fit int32


@dataclass(frozen=True)
class ResizedCrop(Augmentation):
    """A random window of each image, resized to the size of the image by linear interpolation.

    The area of the window is U[smallest, 1] of the image's, and its aspect ratio, relative to the
    image's, is exp(U[log 3/4, log 4/3]). Its sides are rounded to whole pixels, and its place is
    uniform. Integers compute the interpolation, so that the host and the device give the same bits.

    Its draws are "window", int32 [..., 4] in units of 2^-16: height and width as parts of the
    image, then top and left as parts of the room that is left.

    Args:
      smallest: the smallest area, above 0, at most 1.

    Raises:
      ConfigurationError: the area is out of range.

    >>> ResizedCrop(0.25).draw(0, 0, 5, 1, 2, 8)["window"].shape
    (5, 1, 2, 8, 4)

    Reference: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015,
    https://arxiv.org/abs/1409.4842, section 6
    """

    smallest: float = 0.08

    seed_entry: ClassVar[int] = seeds.RESIZED_CROP

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= 1:
            raise ConfigurationError(
                f"the smallest area of a crop must be above 0 and at most 1, got {self.smallest}"
            )

    def check(self, shape: Sequence[int], dtype: Any = np.uint8) -> None:
        super().check(shape, dtype)
        check_pixels(self, dtype)
        if max(shape[:2]) > _LARGEST_SIDE:
            raise ConfigurationError(
                f"{self} needs images of {_LARGEST_SIDE} pixels a side at most, got {list(shape)}"
            )

    def _draw(
        self, generator: np.random.Generator, shape: tuple[int, int]
    ) -> dict[str, NDArray[Any]]:
        window = random_windows(generator, self.smallest, shape) * (1 << _PLACE)
        window[..., :2] = np.rint(window[..., :2])
        return {"window": window.astype(np.int32)}  # of a place, the next multiple below

    def _apply(self, xp: Any, images: Any, draws: Mapping[str, Any]) -> Any:
        window, (height, width) = draws["window"], images.shape[-3:-1]
        low, high, weight = _taps(xp, height, window[..., 0], window[..., 2])
        near, far = (_take(xp, images, index, -3).astype(np.int32) for index in (low, high))
        rows = (near << _WEIGHT) + (far - near) * weight[..., :, None, None]
        low, high, weight = _taps(xp, width, window[..., 1], window[..., 3])
        near, far = (_take(xp, rows, index, -2) for index in (low, high))
        pixels = (near << _WEIGHT) + (far - near) * weight[..., None, :, None]
        return ((pixels + (1 << (2 * _WEIGHT - 1))) >> (2 * _WEIGHT)).astype(np.uint8)


def random_windows(
    generator: np.random.Generator, smallest: float, shape: tuple[int, ...] = (), aspect: float = 1
) -> NDArray[np.float64]:
    """Draw windows with a random area, aspect ratio and place.

    Ten areas and aspect ratios are drawn, and the first that fits the image is taken; if none does,
    the largest window in the middle of the image with an aspect ratio from 3/4 to 4/3.

    Args:
      generator: of the random numbers.
      smallest: smallest area of a window, as a part of the image.
      shape: of the windows that are drawn.
      aspect: width of the image over its height.

    Returns:
      [*shape, 4]: height and width as parts of the image's, top and left as parts, below 1, of the
      room that the window leaves.

    >>> height, width, top, left = random_windows(np.random.default_rng(0), smallest=1.0)
    >>> float(height), float(width)
    (1.0, 1.0)
    """
    area = generator.uniform(smallest, 1, (_ATTEMPTS, *shape))
    bound = np.log(_LONGEST)
    ratio = np.exp(generator.uniform(-bound, bound, (_ATTEMPTS, *shape))) / aspect
    place = generator.uniform(size=(*shape, 2))
    sides = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=-1)
    fits = (sides <= 1).all(-1)
    first = np.take_along_axis(sides, fits.argmax(0)[None, ..., None], axis=0)[0]
    found = np.expand_dims(fits.any(0), -1)
    longest = np.clip(aspect, 1 / _LONGEST, _LONGEST) / aspect
    whole = np.array([min(1.0, 1 / longest), min(1.0, longest)])
    return np.concatenate([np.where(found, first, whole), np.where(found, place, 0.5)], axis=-1)


def _taps(xp: Any, size: int, part: Any, place: Any) -> tuple[Any, Any, Any]:
    """The two pixels between which each pixel of a resized axis lies, and the weight of the second.

    Pixel i of `size` has its centre at (i + 1/2) length / size - 1/2 in a window of some length.
    """
    length = xp.maximum((part * size + (1 << (_PLACE - 1))) >> _PLACE, 1)[..., None]
    start = (place[..., None] * (size - length + 1)) >> _PLACE
    pixel = xp.arange(size, dtype=np.int32).reshape((1,) * place.ndim + (size,))
    centre = xp.clip((2 * pixel + 1) * length - size, 0, 2 * size * (length - 1))  # over 2 size
    low = centre // (2 * size)
    weight = (((centre - 2 * size * low) << _WEIGHT) + size) // (2 * size)
    return start + low, start + xp.minimum(low + 1, length - 1), weight


def _take(xp: Any, images: Any, index: Any, axis: int) -> Any:
    """Rows (axis -3) or columns (axis -2) of images, by an index [..., size]."""
    index = index[..., :, None, None] if axis == -3 else index[..., None, :, None]
    return xp.take_along_axis(images, index, axis)
