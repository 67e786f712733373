"""Maximum pooling that stays fast on CPU: over windows that do not overlap it is plain arithmetic.

The gradient of a window maximum is a scatter, which XLA:CPU runs element by element. Windows that
tile the image do not need it: the pool is the maximum of a few strided views of the image. Average
pooling is Flax's own: its gradient is a plain window sum, and no other form was faster.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import avg_pool
from jax import lax

__all__ = ["avg_pool", "max_pool"]

LARGEST_WINDOW = 16  # entries; a view for each entry of a larger window makes a program too long

Padding = str | Sequence[tuple[int, int]]


def max_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """`flax.nnx.max_pool`, fast where the windows do not overlap.

    Values and gradients equal those of Flax, ties included: the gradient goes to the first maximum
    of a window in row-major order.

    Args:
      inputs: `[..., spatial dimensions, channels]`.
      window_shape: the window's size along each spatial dimension.
      strides: the step along each spatial dimension; as in Flax, 1 where absent.
      padding: "VALID", "SAME" or (low, high) for each spatial dimension.

    Returns:
      The largest entry of each window, `[..., windows along each dimension, channels]`.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2), (2, 2))[0, :, :, 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    window = tuple(window_shape)
    plain = math.prod(window) <= LARGEST_WINDOW and jnp.issubdtype(inputs.dtype, jnp.floating)
    if not (plain and _tiles(inputs, window, strides, padding)):
        return nnx.max_pool(inputs, window, None if strides is None else tuple(strides), padding)
    return _max_of_tiles(window, _whole_windows(inputs, window))


def _tiles(
    inputs: jax.Array, window: tuple[int, ...], strides: Sequence[int] | None, padding: Padding
) -> bool:
    """Whether windows of these strides lie side by side in the image, from its first corner on."""
    steps = (1,) * len(window) if strides is None else tuple(strides)
    sides = inputs.shape[-1 - len(window) : -1]
    if steps != window or inputs.ndim <= len(window) or 0 in inputs.shape:
        return False
    if not isinstance(padding, str):
        return [tuple(pair) for pair in padding] == [(0, 0)] * len(window)
    fit = all(side % size == 0 for side, size in zip(sides, window, strict=True))
    return fit or padding.upper() == "VALID"


def _whole_windows(inputs: jax.Array, window: tuple[int, ...]) -> jax.Array:
    """The image without the rows and columns at its end that fill no window."""
    for axis, size in enumerate(window, start=inputs.ndim - 1 - len(window)):
        whole = inputs.shape[axis] // size * size
        inputs = lax.slice_in_dim(inputs, 0, whole, axis=axis)
    return inputs


def _split(window: tuple[int, ...], image: jax.Array) -> jax.Array:
    """`[..., side, channels]` as `[..., side / size, size, channels]`, in each dimension."""
    lead = image.ndim - 1 - len(window)
    sides = zip(image.shape[lead:-1], window, strict=True)
    pairs = [part for side, size in sides for part in (side // size, size)]
    return image.reshape(*image.shape[:lead], *pairs, image.shape[-1])


def _views(window: tuple[int, ...], image: jax.Array) -> list[jax.Array]:
    """The image's entries at each place of a window, in row-major order of the places."""
    tiles = [_split(window, image)]
    for step in range(len(window)):
        axis = image.ndim - len(window) + step
        tiles = [lax.index_in_dim(t, at, axis, False) for t in tiles for at in range(window[step])]
    return tiles


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _max_of_tiles(window: tuple[int, ...], image: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, _views(window, image))


def _forward(window: tuple[int, ...], image: jax.Array) -> tuple[jax.Array, Any]:
    largest = _max_of_tiles(window, image)
    return largest, (image, largest)


def _backward(window: tuple[int, ...], saved: Any, slope: jax.Array) -> tuple[jax.Array]:
    image, largest = saved
    views = _views(window, image)
    free, parts = jnp.ones_like(largest, bool), []
    for view in views:
        first = free & (view == largest)
        free = free & ~first
        parts.append(jnp.where(first, slope, jnp.zeros_like(slope)))
    return (_join(window, image.shape, parts),)


def _join(window: tuple[int, ...], shape: tuple[int, ...], parts: list[jax.Array]) -> jax.Array:
    """The image whose views are `parts`: `_views` the other way round."""
    lead = len(shape) - 1 - len(window)
    for step in reversed(range(len(window))):
        size = window[step]
        groups = [parts[at : at + size] for at in range(0, len(parts), size)]
        parts = [jnp.stack(group, axis=lead + 1 + step) for group in groups]
    return parts[0].reshape(shape)


_max_of_tiles.defvjp(_forward, _backward)
