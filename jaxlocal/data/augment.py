"""Augmentation of images by random crops and flips.

| spec | augmentation |
|---|---|
| `none` | none |
| `flip` | each image is mirrored left to right with probability 1/2 |
| `crop`, `crop:PAD` | a random window of the image's size, out of the image padded by PAD zeros |
| `crop,flip`, `crop:PAD,flip` | both |

The host draws the random numbers, and the images are changed where they are: on the device or on
the host. The numbers are a pure function of (seed, step), so a run with all examples on the device
and a streamed run see the same images, from whichever step they start. Workers are numbered hub by
hub; the numbers do not depend on the grouping into hubs.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlocal.data.checks import check_name
from jaxlocal.errors import ConfigurationError, unknown

AUGMENTATIONS = ("none", "flip", "crop")

# The second entry of every seed in `jaxlocal.data` is distinct: other files use 0 to 4 and 6.
_AUGMENTATION = 5
_LARGEST_PAD = 127  # shifts are int8


@dataclass(frozen=True)
class CropFlip:
    """Random crop of images that are padded with zeros, and random horizontal flip.

    Args:
      pad: largest shift of the crop in each direction, 0 to 127 pixels; 0 for no crop.
      flip: whether each image is mirrored with probability 1/2.

    Raises:
      ConfigurationError: `pad` is out of range.

    >>> draws = CropFlip(pad=4).draw(0, 10, 3, 2, 4, 32)
    >>> draws["shift"].shape, draws["flip"].shape
    ((3, 2, 4, 32, 2), (3, 2, 4, 32))
    """

    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.pad <= _LARGEST_PAD:
            raise ConfigurationError(
                f"the padding of a crop must be 0 to {_LARGEST_PAD} pixels, got {self.pad}"
            )

    def draw(
        self,
        seed: int,
        start_step: int,
        steps: int,
        hubs: int,
        workers_per_hub: int,
        batch_size: int,
    ) -> dict[str, NDArray[Any]]:
        """Draw the shift and the flip of each image of some steps, for `crop_and_flip`.

        Args:
          seed: the run's seed, not negative.
          start_step: the first step.
          steps, hubs, workers_per_hub, batch_size: numbers of steps, of hubs, of workers in a hub,
            and of examples in a batch.

        Returns:
          A dict of "shift", int8 [steps, hubs, workers_per_hub, batch_size, 2], the pixels by which
          the window moves down and right, -pad to pad; and "flip", bool [steps, hubs,
          workers_per_hub, batch_size].
        """
        shape = (steps, hubs * workers_per_hub, batch_size)
        shift, flip = np.zeros((*shape, 2), np.int8), np.zeros(shape, bool)
        for step, (down_right, mirrored) in enumerate(zip(shift, flip, strict=True), start_step):
            generator = np.random.default_rng((seed, _AUGMENTATION, step))
            down_right[:] = generator.integers(
                -self.pad, self.pad, size=down_right.shape, dtype=np.int8, endpoint=True
            )
            if self.flip:
                mirrored[:] = generator.integers(2, size=mirrored.shape, dtype=np.uint8)
        grid = (steps, hubs, workers_per_hub, batch_size)
        return {"shift": shift.reshape(*grid, 2), "flip": flip.reshape(grid)}


def parse_augmentation(spec: str) -> CropFlip | None:
    """Parse the spec of an augmentation, such as "crop:4,flip".

    Args:
      spec: see `jaxlocal.data.augment`.

    Returns:
      The augmentation; None for "none".

    Raises:
      ConfigurationError: a name is unknown or repeated, or a padding is not from 1 to 127.

    >>> parse_augmentation("crop:2,flip")
    CropFlip(pad=2, flip=True)
    >>> parse_augmentation("none")
    """
    check_name("an augmentation", spec)
    names, pad = [], 0
    for part in spec.split(","):
        name, colon, argument = part.strip().partition(":")
        if name not in AUGMENTATIONS:
            raise unknown("augmentation", name, AUGMENTATIONS)
        if colon and name != "crop":
            raise ConfigurationError(f"augmentation {name!r} takes no argument, got {part!r}")
        if name == "crop":
            pad = _padding(spec, argument) if colon else CropFlip.pad
        names.append(name)
    if len(set(names)) < len(names):
        raise ConfigurationError(f"augmentation {spec!r} names {_repeated(names)!r} more than once")
    if "none" in names and len(names) > 1:
        raise ConfigurationError(f"augmentation 'none' cannot be combined, got {spec!r}")
    return None if names == ["none"] else CropFlip(pad, "flip" in names)


def crop_and_flip(images: Any, shift: Any, flip: Any) -> jax.Array:
    """Crop images at shifted windows, with zeros beyond the edges, and mirror some, in JAX.

    out[y, x] = image[y + down, x' + right] where x' = W - 1 - x for a mirrored image, else x; zero
    outside of the image.

    Args:
      images: [..., H, W, C], of any dtype.
      shift: integers [..., 2], pixels down and right.
      flip: bool [...], whether each image is mirrored.

    Returns:
      [..., H, W, C], of the dtype of `images`.

    >>> image = np.arange(1, 7).reshape(2, 3, 1)
    >>> print(crop_and_flip(image, np.array([0, 1]), np.array(False))[..., 0])
    [[2 3 0]
     [5 6 0]]
    """
    images, shift, flip = jnp.asarray(images), jnp.asarray(shift, jnp.int32), jnp.asarray(flip)
    height, width = images.shape[-3:-1]
    along = lambda size: jnp.arange(size).reshape((1,) * (shift.ndim - 1) + (size,))
    rows, columns = along(height) + shift[..., :1], along(width)
    columns = jnp.where(flip[..., None], columns[..., ::-1], columns) + shift[..., 1:]
    # Two gathers, of rows and of columns, are faster than one gather of pixels.
    rows, columns = rows[..., :, None, None], columns[..., None, :, None]
    moved = _take(_take(images, rows, -3), columns, -2)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return jnp.where(inside, moved, jnp.zeros((), images.dtype))


def _take(images: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    near = jnp.clip(index, 0, images.shape[axis] - 1)
    return jnp.take_along_axis(images, near, axis, mode="promise_in_bounds")


def crop_and_flip_on_host(
    images: NDArray[Any], shift: NDArray[Any], flip: NDArray[Any]
) -> NDArray[Any]:
    """Crop and mirror images as `crop_and_flip`, in NumPy; the values are the same.

    Args:
      images, shift, flip: as for `crop_and_flip`.

    >>> image = np.arange(1, 7).reshape(2, 3, 1)
    >>> print(crop_and_flip_on_host(image, np.array([0, 1]), np.array(True))[..., 0])
    [[0 3 2]
     [0 6 5]]
    """
    out = np.zeros_like(images)
    size = images.shape[-3:]
    for image, result, (down, right), mirrored in zip(
        images.reshape(-1, *size),
        out.reshape(-1, *size),
        shift.reshape(-1, 2).tolist(),
        flip.ravel().tolist(),
        strict=True,
    ):
        rows, columns = _overlap(size[0], down), _overlap(size[1], right)
        window = result[:, ::-1] if mirrored else result
        window[rows[1], columns[1]] = image[rows[0], columns[0]]
    return out


def _overlap(size: int, shift: int) -> tuple[slice, slice]:
    """The part of an axis that a shifted window overlaps, as slices of the image and the window."""
    length = max(0, size - abs(shift))
    source, target = max(0, shift), max(0, -shift)
    return slice(source, source + length), slice(target, target + length)


def _padding(spec: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _LARGEST_PAD:
        raise ConfigurationError(
            f"the padding of a crop must be a whole number from 1 to {_LARGEST_PAD}, got {text!r} "
            f"in {spec!r}"
        )
    return int(text)


def _repeated(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)
