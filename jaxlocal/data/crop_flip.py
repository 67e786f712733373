"""Random crops of padded images, and random flips."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlocal.data import seeds
from jaxlocal.data.augmentation import Augmentation
from jaxlocal.errors import ConfigurationError

LARGEST_PAD = 127  # shifts are int8


@dataclass(frozen=True)
class CropFlip(Augmentation):
    """Random crop of images that are padded with zeros, and random horizontal flip.

    Its draws are "shift", int8 [..., 2], the pixels by which the window moves down and right, -pad
    to pad; and "flip", bool [...].

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

    seed_entry: ClassVar[int] = seeds.CROP_FLIP

    def __post_init__(self) -> None:
        if not 0 <= self.pad <= LARGEST_PAD:
            raise ConfigurationError(
                f"the padding of a crop must be 0 to {LARGEST_PAD} pixels, got {self.pad}"
            )

    def _draw(
        self, generator: np.random.Generator, shape: tuple[int, int]
    ) -> dict[str, NDArray[Any]]:
        pad = self.pad
        shift = generator.integers(-pad, pad, size=(*shape, 2), dtype=np.int8, endpoint=True)
        flip = generator.integers(2, size=shape, dtype=np.uint8) if self.flip else np.zeros(shape)
        return {"shift": shift, "flip": flip.astype(bool)}

    def apply(self, images: Any, draws: Mapping[str, Any]) -> jax.Array:
        return crop_and_flip(images, draws["shift"], draws["flip"])

    def apply_on_host(self, images: NDArray[Any], draws: Mapping[str, Any]) -> NDArray[Any]:
        return crop_and_flip_on_host(images, draws["shift"], draws["flip"])


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
