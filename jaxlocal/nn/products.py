"""A convolution and its two gradients as matrix products, which a CPU does at its full rate where a
convolution does not: small images, strides, single channels, and weight gradients.

Pixels are the rows of a matrix. Along most of its dimensions the kernel is *laid out*: shifted
images stand beside one another, as columns of the matrix. Along the others it is *added*: one
product gives what each tap contributes, and the contributions are added up, shifted. A 3 x 3 kernel
so takes three copies of an image instead of nine.
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
    """One spatial dimension: output r reads input stride·r + dilation·tap − low."""

    size: int  # of the input
    out: int  # of the output
    taps: int  # of the kernel
    stride: int = 1
    dilation: int = 1
    low: int = 0  # padding before the first input

    def read(self, x: jax.Array, dim: int, tap: int) -> jax.Array:
        """What the outputs read of `x` [..., size, ...] through a tap: [..., out, ...]."""
        start, extent = self.dilation * tap - self.low, self.stride * (self.out - 1) + 1
        x = _pad(x, dim, -start, start + extent - self.size)
        return lax.slice_in_dim(x, 0, extent, self.stride, dim)

    def spread(self, x: jax.Array, dim: int, tap: int) -> jax.Array:
        """`read` the other way round, its transpose: [..., out, ...] to [..., size, ...]."""
        start, extent = self.dilation * tap - self.low, self.stride * (self.out - 1) + 1
        return _pad(x, dim, start, self.size - start - extent, self.stride - 1)


Axes = tuple[Axis, ...]


def forward(axes: Axes, image: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    """`[batch, *sizes, in]` by `[*taps, in, out]` to `[batch, *outs, out]`, float32 or wider."""
    laid, added = _split(axes, _is_large(kernel.shape, image))
    columns = _lay_out(axes, laid, Axis.read, image)
    parts = _product(columns, _matrix(kernel, laid, added), precision)
    return _add_up(axes, added, Axis.read, parts)


def input_gradient(
    axes: Axes, kernel: jax.Array, slope: jax.Array, precision: Any = None
) -> jax.Array:
    """`[*taps, in, out]` and slopes `[batch, *outs, out]` to `[batch, *sizes, in]`."""
    if _is_large(kernel.shape, slope):
        added = list(range(len(axes)))
        flat = _product(slope, kernel.reshape(-1, slope.shape[-1]), precision, (-1, 1))
        parts = flat.reshape(*slope.shape[:-1], *kernel.shape[:-1])
    else:
        added = [a for a, axis in enumerate(axes) if a == 0 or axis.stride > 1]
        laid = [a for a in range(len(axes)) if a not in added]
        columns = _lay_out(axes, laid, Axis.spread, slope)
        parts = _product(columns, _matrix(kernel.swapaxes(-1, -2), laid, added), precision)
    return _add_up(axes, added, Axis.spread, parts)


def weight_gradient(
    axes: Axes, image: jax.Array, slope: jax.Array, precision: Any = None
) -> jax.Array:
    """`[batch, *sizes, in]` and slopes `[batch, *outs, out]` to `[*taps, in, out]`."""
    sizes = [*(axis.taps for axis in axes), image.shape[-1], slope.shape[-1]]
    laid, added = _split(axes, _is_large(sizes, image))
    columns = _lay_out(axes, laid, Axis.read, image)
    slopes = _lay_out(axes, added, Axis.spread, slope)
    columns, slopes = (x.reshape(-1, x.shape[-1]) for x in (columns, slopes))
    order = _order(len(axes), laid, added)
    gradient = _product(columns, slopes, precision, (0, 0)).reshape([sizes[dim] for dim in order])
    return gradient.transpose([order.index(dim) for dim in range(len(order))])


def grouped_weight_gradient(
    axes: Axes, groups: int, image: jax.Array, slope: jax.Array, precision: Any = None
) -> jax.Array:
    """`weight_gradient` of a convolution whose channels lie in so many groups, tap by tap: `[batch,
    *sizes, groups · in]` and slopes `[batch, *outs, groups · out]` to `[*taps, in, groups ·
    out]`."""
    of_groups = lambda x: x.reshape(-1, groups, x.shape[-1] // groups)
    gradients = []
    for taps in product(*(range(axis.taps) for axis in axes)):
        moved = image
        for a, tap in enumerate(taps):
            moved = axes[a].read(moved, a + 1, tap)
        gradients.append(
            jnp.einsum("ngi,ngo->igo", of_groups(moved), of_groups(slope), precision=precision)
        )
    sizes = [axis.taps for axis in axes]
    return jnp.stack(gradients).reshape(*sizes, image.shape[-1] // groups, slope.shape[-1])


def _is_large(kernel: Sequence[int], image: jax.Array) -> bool:
    """Whether a kernel is larger than what it is applied to: too large to be transposed for it."""
    return math.prod(kernel) > image.size


def _split(axes: Axes, large: bool) -> tuple[list[int], list[int]]:
    """The dimensions that are laid out and those that are added: none of a large kernel, which so
    is a matrix as it lies, and none with a stride, which would throw most of the sums away."""
    first = int(not large and axes[0].stride == 1)
    return list(range(first, len(axes))), list(range(first))


def _order(dims: int, laid: Sequence[int], added: Sequence[int]) -> list[int]:
    """The dimensions [*taps, in, out] of a kernel in its matrix: those of rows, then of columns."""
    return [*laid, dims, *added, dims + 1]


def _lay_out(axes: Axes, laid: Sequence[int], move: Callable, x: jax.Array) -> jax.Array:
    """Shifted arrays side by side, [..., taps · channels]."""
    for a in reversed(laid):
        x = jnp.concatenate([move(axes[a], x, a + 1, tap) for tap in range(axes[a].taps)], -1)
    return x


def _matrix(kernel: jax.Array, laid: Sequence[int], added: Sequence[int]) -> jax.Array:
    """A kernel [*taps, in, out] as [laid taps · in, added taps..., out]."""
    kernel = kernel.transpose(_order(kernel.ndim - 2, laid, added))
    return kernel.reshape(-1, *kernel.shape[len(laid) + 1 :])


def _product(
    x: jax.Array, y: jax.Array, precision: Any, over: tuple[int, int] = (-1, 0)
) -> jax.Array:
    """The product over a dimension of each; half precision is summed in float32."""
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    dims = (((over[0] % x.ndim,), (over[1],)), ((), ()))
    return lax.dot_general(x, y, dims, precision, preferred_element_type=wide)


def _add_up(axes: Axes, added: Sequence[int], move: Callable, parts: jax.Array) -> jax.Array:
    """Contributions [batch, ..., added taps..., channels], shifted and added."""
    for a in reversed(added):
        taps = [lax.index_in_dim(parts, tap, -2, False) for tap in range(axes[a].taps)]
        parts = reduce(add, [move(axes[a], x, a + 1, tap) for tap, x in enumerate(taps)])
    return parts


def _pad(x: jax.Array, dim: int, low: int, high: int, between: int = 0) -> jax.Array:
    """Zeros before, after and between the entries of one dimension; negative ones cut entries."""
    config = [(0, 0, 0)] * x.ndim
    config[dim] = (low, high, between)
    return lax.pad(x, jnp.zeros((), x.dtype), config)
