"""Max-pooling that stays fast on CPU, and average pooling.

The gradient of a window maximum is a scatter, which XLA:CPU runs element by element. Windows that
do not overlap need no scatter: the pooling is the maximum of a few strided views of the image.
Average pooling is Flax's own, since its gradient is a plain window sum and no form was faster.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

LARGEST_WINDOW = 16  # entries; with a view for each entry, a larger window makes a long program

Padding = str | Sequence[tuple[int, int]]


def avg_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> jax.Array:
    """Average pooling, as `flax.nnx.avg_pool`.

    Args:
      inputs: `[..., spatial dimensions, channels]`.
      window_shape: the window's size along each spatial dimension.
      strides: the step along each spatial dimension; as in Flax, 1 by default.
      padding: "VALID", "SAME" or (low, high) for each spatial dimension.
      count_include_pad: whether the mean counts the padding.

    Returns:
      The mean of each window, `[..., windows along each dimension, channels]`.

    >>> avg_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2), (2, 2))[0, :, :, 0]
    Array([[ 2.5,  4.5],
           [10.5, 12.5]], dtype=float32)
    """
    window, steps = tuple(window_shape), None if strides is None else tuple(strides)
    pool: Any = nnx.avg_pool  # untyped in Flax
    with jax.numpy_dtype_promotion("standard"):  # Flax divides by an integer
        averages: jax.Array = pool(inputs, window, steps, padding, count_include_pad)
    return averages


def max_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """Max-pooling, as `flax.nnx.max_pool`, which is fast on CPU where the windows do not overlap.

    Values and gradients equal those of Flax, also for equal entries: the gradient goes to the
    first maximum of a window in row-major order.

    Args:
      inputs: `[..., spatial dimensions, channels]`.
      window_shape: the window's size along each spatial dimension.
      strides: the step along each spatial dimension; as in Flax, 1 by default.
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
    """Whether the windows neither overlap nor leave gaps, and start at the image's first entry."""
    steps = (1,) * len(window) if strides is None else tuple(strides)
    sides = inputs.shape[-1 - len(window) : -1]
    if steps != window or inputs.ndim <= len(window) or 0 in inputs.shape:
        return False
    if not isinstance(padding, str):
        return [tuple(pair) for pair in padding] == [(0, 0)] * len(window)
    fit = all(side % size == 0 for side, size in zip(sides, window, strict=True))
    return fit or padding.upper() == "VALID"


def _whole_windows(inputs: jax.Array, window: tuple[int, ...]) -> jax.Array:
    """The image without the last rows and columns that do not fill a window."""
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
    """For each position in a window, the image's entries there; positions in row-major order."""
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


def _backward(window: tuple[int, ...], saved: Any, cotangent: jax.Array) -> tuple[jax.Array]:
    image, largest = saved
    views = _views(window, image)
    free, parts = jnp.ones_like(largest, bool), []
    for view in views:
        first = free & (view == largest)
        free = free & ~first
        parts.append(jnp.where(first, cotangent, jnp.zeros_like(cotangent)))
    return (_join(window, image.shape, parts),)


def _join(window: tuple[int, ...], shape: tuple[int, ...], parts: list[jax.Array]) -> jax.Array:
    """The image whose views are `parts`, the inverse of `_views`."""
    lead = len(shape) - 1 - len(window)
    for step in reversed(range(len(window))):
        size = window[step]
        groups = [parts[at : at + size] for at in range(0, len(parts), size)]
        parts = [jnp.stack(group, axis=lead + 1 + step) for group in groups]
    return parts[0].reshape(shape)


_max_of_tiles.defvjp(_forward, _backward)
