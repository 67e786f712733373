"""A convolution and its two gradients as matrix products.

On CPU, matrix products are faster than convolutions for small images, strides, single channels and
weight gradients.

Pixels are the rows of a matrix. Along most dimensions of the kernel, the taps are *laid out*: the
shifted images of all taps are concatenated as columns of the matrix. Along the other dimensions,
the taps are *added*: one product gives the contributions of all taps, which are shifted and summed.
A 3 x 3 kernel then takes three copies of the image instead of nine.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Axis(NamedTuple):
    """One spatial dimension: output r reads input stride·r + dilation·tap − low through a tap."""

    size: int  # of the input
    out: int  # of the output
    taps: int  # of the kernel
    stride: int = 1
    dilation: int = 1
    low: int = 0  # padding before the first input

    def read(self, x: jax.Array, dim: int, tap: int) -> jax.Array:
        """The entries of x [..., size, ...] that a tap of the outputs reads: [..., out, ...]."""
        start, extent = self.dilation * tap - self.low, self.stride * (self.out - 1) + 1
        x = _pad(x, dim, -start, start + extent - self.size)
        return lax.slice_in_dim(x, 0, extent, self.stride, dim)

    def spread(self, x: jax.Array, dim: int, tap: int) -> jax.Array:
        """The transpose of `read`: [..., out, ...] to [..., size, ...]."""
        start, extent = self.dilation * tap - self.low, self.stride * (self.out - 1) + 1
        return _pad(x, dim, start, self.size - start - extent, self.stride - 1)


Axes = tuple[Axis, ...]
Move = Callable[[Axis, jax.Array, int, int], jax.Array]  # Axis.read or Axis.spread


def forward(axes: Axes, image: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    """Convolve an image with a kernel, to `[batch, *outs, out]` in float32 or float64.

    Args:
      axes: the spatial dimensions.
      image: `[batch, *sizes, in]`.
      kernel: `[*taps, in, out]`.
      precision: as in `jax.lax`.
    """
    laid, added = _split(axes, _is_large(kernel.shape, image))
    columns = _lay_out(axes, laid, Axis.read, image)
    parts = _product(columns, _matrix(kernel, laid, added), precision)
    return _add_up(axes, added, Axis.read, parts)


def input_gradient(
    axes: Axes, kernel: jax.Array, cotangent: jax.Array, precision: Any = None
) -> jax.Array:
    """Gradient of the image, `[batch, *sizes, in]`.

    Args:
      axes: the spatial dimensions.
      kernel: `[*taps, in, out]`.
      cotangent: `[batch, *outs, out]`.
      precision: as in `jax.lax`.
    """
    if _is_large(kernel.shape, cotangent):
        added = list(range(len(axes)))
        flat = _product(cotangent, kernel.reshape(-1, cotangent.shape[-1]), precision, (-1, 1))
        parts = flat.reshape(*cotangent.shape[:-1], *kernel.shape[:-1])
    else:
        added = [a for a, axis in enumerate(axes) if a == 0 or axis.stride > 1]
        laid = [a for a in range(len(axes)) if a not in added]
        columns = _lay_out(axes, laid, Axis.spread, cotangent)
        parts = _product(columns, _matrix(kernel.swapaxes(-1, -2), laid, added), precision)
    return _add_up(axes, added, Axis.spread, parts)


def weight_gradient(
    axes: Axes, image: jax.Array, cotangent: jax.Array, precision: Any = None
) -> jax.Array:
    """Gradient of the kernel, `[*taps, in, out]`.

    Args:
      axes: the spatial dimensions.
      image: `[batch, *sizes, in]`.
      cotangent: `[batch, *outs, out]`.
      precision: as in `jax.lax`.
    """
    sizes = [*(axis.taps for axis in axes), image.shape[-1], cotangent.shape[-1]]
    laid, added = _split(axes, _is_large(sizes, image))
    columns = _lay_out(axes, laid, Axis.read, image)
    cotangents = _lay_out(axes, added, Axis.spread, cotangent)
    columns, cotangents = (x.reshape(-1, x.shape[-1]) for x in (columns, cotangents))
    order = _order(len(axes), laid, added)
    gradient = _product(columns, cotangents, precision, (0, 0)).reshape(
        [sizes[dim] for dim in order]
    )
    return gradient.transpose([order.index(dim) for dim in range(len(order))])


def grouped_weight_gradient(
    axes: Axes, groups: int, image: jax.Array, cotangent: jax.Array, precision: Any = None
) -> jax.Array:
    """Gradient of the kernel of a convolution with feature groups, by one product for each tap.

    Args:
      axes: the spatial dimensions.
      groups: number of feature groups.
      image: `[batch, *sizes, groups · in]`.
      cotangent: `[batch, *outs, groups · out]`.
      precision: as in `jax.lax`.

    Returns:
      `[*taps, in, groups · out]`.
    """

    def of_groups(x: jax.Array) -> jax.Array:
        return x.reshape(-1, groups, x.shape[-1] // groups)

    gradients = []
    for taps in product(*(range(axis.taps) for axis in axes)):
        moved = image
        for a, tap in enumerate(taps):
            moved = axes[a].read(moved, a + 1, tap)
        gradients.append(
            jnp.einsum("ngi,ngo->igo", of_groups(moved), of_groups(cotangent), precision=precision)
        )
    sizes = [axis.taps for axis in axes]
    return jnp.stack(gradients).reshape(*sizes, image.shape[-1] // groups, cotangent.shape[-1])


def _is_large(kernel: Sequence[int], image: jax.Array) -> bool:
    """Whether a kernel is larger than the image, so that transposing it would take too long."""
    return math.prod(kernel) > image.size


def _split(axes: Axes, large: bool) -> tuple[list[int], list[int]]:
    """The dimensions whose taps are laid out, and those whose taps are added.

    No taps of a large kernel are added, since the kernel then is a matrix without a transposition,
    and none of a dimension with a stride, since most of the sums would not be read.
    """
    first = int(not large and axes[0].stride == 1)
    return list(range(first, len(axes))), list(range(first))


def _order(dims: int, laid: Sequence[int], added: Sequence[int]) -> list[int]:
    """Order of a kernel's dimensions [*taps, in, out] in its matrix: rows first, then columns."""
    return [*laid, dims, *added, dims + 1]


def _lay_out(axes: Axes, laid: Sequence[int], move: Move, x: jax.Array) -> jax.Array:
    """Concatenate the arrays that are shifted for each tap, to [..., taps · channels]."""
    for a in reversed(laid):
        x = jnp.concatenate([move(axes[a], x, a + 1, tap) for tap in range(axes[a].taps)], -1)
    return x


def _matrix(kernel: jax.Array, laid: Sequence[int], added: Sequence[int]) -> jax.Array:
    """Reshape a kernel [*taps, in, out] to [laid-out taps · in, added taps..., out]."""
    kernel = kernel.transpose(_order(kernel.ndim - 2, laid, added))
    return kernel.reshape(-1, *kernel.shape[len(laid) + 1 :])


def _product(
    x: jax.Array, y: jax.Array, precision: Any, over: tuple[int, int] = (-1, 0)
) -> jax.Array:
    """Contract a dimension of each array; half precision is summed in float32."""
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    dims = (((over[0] % x.ndim,), (over[1],)), ((), ()))
    return lax.dot_general(x, y, dims, precision, preferred_element_type=wide)


def _add_up(axes: Axes, added: Sequence[int], move: Move, parts: jax.Array) -> jax.Array:
    """Shift the contributions [batch, ..., added taps..., channels] of all taps, and sum them."""
    for a in reversed(added):
        taps = [lax.index_in_dim(parts, tap, -2, False) for tap in range(axes[a].taps)]
        parts = reduce(add, [move(axes[a], x, a + 1, tap) for tap, x in enumerate(taps)])
    return parts


def _pad(x: jax.Array, dim: int, low: int, high: int, between: int = 0) -> jax.Array:
    """Pad one dimension by zeros before, after and between its entries; negative numbers crop."""
    config = [(0, 0, 0)] * x.ndim
    config[dim] = (low, high, between)
    return lax.pad(x, jnp.zeros((), x.dtype), config)
