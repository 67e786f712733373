"""The forms of a convolution and its two gradients that a CPU runs fast, and which it takes.

Each is a convolution with channels last, which XLA:CPU has a kernel for, or a matrix product.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.nn import products
from jaxlocal.nn.products import Axes, Axis

# Measured on CPU cores with AVX2: images of 4 x 4 to 56 x 56, 1 to 512 channels, batches of 4 to
# 64. Up to so many pixels a product is the faster form; with fewer channels it is not.
SMALL_IMAGE, FEW_CHANNELS = 256, 8

_LAYOUTS = {
    1: ("NWC", "WIO", "NWC"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NDHWC", "DHWIO", "NDHWC"),
}


class Plan(NamedTuple):
    """What is static about a convolution `[batch, *sizes, in]` by `[*taps, in / groups, out]`."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    spacing: tuple[int, ...]  # of the input: lhs_dilation
    dilation: tuple[int, ...]  # of the kernel: rhs_dilation
    groups: int
    precision: Any
    result_type: Any


def plain(plan: Plan, image: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[batch, *outs, out]`, by `jax.lax`."""
    return _convolution(
        plan, image, kernel, plan.strides, plan.pads, plan.spacing, plan.dilation, plan.groups
    )


def plain_gradients(
    plan: Plan, image: jax.Array, kernel: jax.Array, slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of image and kernel that JAX derives, for the slopes `[batch, *outs, out]`."""
    return jax.vjp(lambda *operands: plain(plan, *operands), image, kernel)[1](slope)


def forward(plan: Plan, image: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[batch, *outs, out]`, fast on CPU."""
    axes = _axes(plan, image.shape, kernel.shape)
    small = _small(axes) and image.shape[-1] >= FEW_CHANNELS
    if min(axis.out for axis in axes) < 1 or not _by_product(plan, axes, plan.result_type, small):
        return plain(plan, image, kernel)
    image, kernel = image.astype(plan.result_type), kernel.astype(plan.result_type)  # as JAX sums
    return products.forward(axes, image, kernel, plan.precision).astype(plan.result_type)


def gradients(
    plan: Plan, image: jax.Array, kernel: jax.Array, slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of image and kernel, fast on CPU."""
    axes = _axes(plan, image.shape, kernel.shape)
    to_image = _input_gradient(plan, axes, kernel.astype(slope.dtype), slope)
    to_kernel = _weight_gradient(plan, axes, image.astype(slope.dtype), slope)
    return to_image.astype(image.dtype), to_kernel.astype(kernel.dtype)


def _input_gradient(plan: Plan, axes: Axes, kernel: jax.Array, slope: jax.Array) -> jax.Array:
    """Spread the slopes to the strides they came from, and convolve them with the turned kernel."""
    small = _small(axes) and slope.shape[-1] >= FEW_CHANNELS and set(plan.strides) == {1}
    if _by_product(plan, axes, slope.dtype, small):
        return products.input_gradient(axes, kernel, slope, plan.precision)
    pads = []
    for axis, space in zip(axes, plan.spacing, strict=True):
        reach, spread = axis.dilation * (axis.taps - 1), axis.stride * (axis.out - 1) + 1
        low = reach - axis.low
        pads.append((low, space * (axis.size - 1) + reach + 1 - spread - low))
    *taps, ins, outs = kernel.shape
    turned = lax.rev(kernel, range(len(taps))).reshape(*taps, ins, plan.groups, outs // plan.groups)
    turned = jnp.moveaxis(turned, -1, len(taps)).swapaxes(-1, -2)
    turned = turned.reshape(*taps, outs // plan.groups, ins * plan.groups)
    return _convolution(
        plan, slope, turned, plan.spacing, pads, plan.strides, plan.dilation, plan.groups
    )


def _weight_gradient(plan: Plan, axes: Axes, image: jax.Array, slope: jax.Array) -> jax.Array:
    """Convolve the input with the slopes, its channels in place of its batch and vice versa."""
    if plan.groups > 1:
        between = [(0, 0, space - 1) for space in plan.spacing]
        image = lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *between, (0, 0, 0)])
        sizes = zip(axes, image.shape[1:-1], strict=True)
        axes = tuple(axis._replace(size=size) for axis, size in sizes)
        return products.grouped_weight_gradient(axes, plan.groups, image, slope, plan.precision)
    if _by_product(plan, axes, slope.dtype, image.shape[-1] >= FEW_CHANNELS):
        return products.weight_gradient(axes, image, slope, plan.precision)
    pads = []
    for axis, space in zip(axes, plan.spacing, strict=True):
        reach, spread = axis.dilation * (axis.taps - 1), axis.stride * (axis.out - 1) + 1
        pads.append((axis.low, reach + spread - (space * (axis.size - 1) + 1) - axis.low))
    channels_first, batch_second_last = image.swapaxes(0, -1), jnp.moveaxis(slope, 0, -2)
    gradient = _convolution(
        plan, channels_first, batch_second_last, plan.dilation, pads, plan.spacing, plan.strides
    )
    return jnp.moveaxis(gradient, 0, -2)


def _axes(plan: Plan, image: tuple[int, ...], kernel: tuple[int, ...]) -> Axes:
    """The spatial dimensions, for an input and a kernel of these shapes."""
    axes = []
    for a, (low, high) in enumerate(plan.pads):
        size, taps, stride, dilation = image[a + 1], kernel[a], plan.strides[a], plan.dilation[a]
        padded = plan.spacing[a] * (size - 1) + 1 + low + high
        out = (padded - dilation * (taps - 1) - 1) // stride + 1
        axes.append(Axis(size, out, taps, stride, dilation, low))
    return tuple(axes)


def _by_product(plan: Plan, axes: Axes, dtype: Any, faster: bool) -> bool:
    """Whether to multiply: a kernel of one pixel is a matrix anyway, and for float64 XLA:CPU has no
    convolution but a generic loop."""
    possible = plan.groups == 1 and set(plan.spacing) == {1}
    pixel = all(axis.taps == 1 for axis in axes)
    return possible and (faster or pixel or dtype == jnp.float64)


def _small(axes: Axes) -> bool:
    return math.prod(axis.size for axis in axes) <= SMALL_IMAGE


def _convolution(
    plan: Plan,
    lhs: jax.Array,
    rhs: jax.Array,
    strides: Any,
    pads: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    groups: int = 1,
) -> jax.Array:
    return lax.conv_general_dilated(
        lhs,
        rhs,
        strides,
        pads,
        lhs_dilation,
        rhs_dilation,
        _LAYOUTS[lhs.ndim - 2],
        feature_group_count=groups,
        precision=plan.precision,
        preferred_element_type=plan.result_type,
    )
