"""Fast forms of a convolution and its two gradients on CPU, and the choice between them.

Each form is a convolution with channels last, for which XLA:CPU has a fast kernel, or a matrix
product.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.nn import products
from jaxlocal.nn.products import Axes, Axis

# A matrix product is the faster form for images of up to SMALL_IMAGE pixels with FEW_CHANNELS
# channels or more. This was measured on CPU cores with AVX2, for images of 4 x 4 to 56 x 56 pixels,
# 1 to 512 channels and batches of 4 to 64.
SMALL_IMAGE, FEW_CHANNELS = 256, 8

_LAYOUTS = {
    1: ("NWC", "WIO", "NWC"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NDHWC", "DHWIO", "NDHWC"),
}


class Plan(NamedTuple):
    """Static arguments of a convolution `[batch, *sizes, in]` by `[*taps, in / groups, out]`."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    spacing: tuple[int, ...]  # of the input: lhs_dilation
    dilation: tuple[int, ...]  # of the kernel: rhs_dilation
    groups: int
    precision: Any
    result_type: Any


def plain(plan: Plan, image: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve by `jax.lax`, to `[batch, *outs, out]`."""
    return _convolution(
        plan, image, kernel, plan.strides, plan.pads, plan.spacing, plan.dilation, plan.groups
    )


def plain_gradients(
    plan: Plan, image: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of image and kernel as JAX derives them, for a cotangent `[batch, *outs, out]`."""
    return jax.vjp(lambda *operands: plain(plan, *operands), image, kernel)[1](cotangent)


def forward(plan: Plan, image: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve by the fastest form on CPU, to `[batch, *outs, out]`."""
    axes = _axes(plan, image.shape, kernel.shape)
    small = _small(axes) and image.shape[-1] >= FEW_CHANNELS
    if min(axis.out for axis in axes) < 1 or not _by_product(plan, axes, plan.result_type, small):
        return plain(plan, image, kernel)
    # JAX sums in the type of the result.
    image, kernel = image.astype(plan.result_type), kernel.astype(plan.result_type)
    return products.forward(axes, image, kernel, plan.precision).astype(plan.result_type)


def gradients(
    plan: Plan, image: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of image and kernel by the fastest forms on CPU."""
    axes = _axes(plan, image.shape, kernel.shape)
    to_image = _input_gradient(plan, axes, kernel.astype(cotangent.dtype), cotangent)
    to_kernel = _weight_gradient(plan, axes, image.astype(cotangent.dtype), cotangent)
    return to_image.astype(image.dtype), to_kernel.astype(kernel.dtype)


def _input_gradient(plan: Plan, axes: Axes, kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Dilate the cotangent by the strides, and convolve it with the reversed kernel."""
    small = _small(axes) and cotangent.shape[-1] >= FEW_CHANNELS and set(plan.strides) == {1}
    if _by_product(plan, axes, cotangent.dtype, small):
        return products.input_gradient(axes, kernel, cotangent, plan.precision)
    pads = []
    for axis, space in zip(axes, plan.spacing, strict=True):
        reach, extent = axis.dilation * (axis.taps - 1), axis.stride * (axis.out - 1) + 1
        low = reach - axis.low
        pads.append((low, space * (axis.size - 1) + reach + 1 - extent - low))
    *taps, ins, outs = kernel.shape
    reversed_kernel = lax.rev(kernel, range(len(taps))).reshape(
        *taps, ins, plan.groups, outs // plan.groups
    )
    reversed_kernel = jnp.moveaxis(reversed_kernel, -1, len(taps)).swapaxes(-1, -2)
    reversed_kernel = reversed_kernel.reshape(*taps, outs // plan.groups, ins * plan.groups)
    return _convolution(
        plan,
        cotangent,
        reversed_kernel,
        plan.spacing,
        pads,
        plan.strides,
        plan.dilation,
        plan.groups,
    )


def _weight_gradient(plan: Plan, axes: Axes, image: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Convolve the input with the cotangent, with batch and channels swapped."""
    if plan.groups > 1:
        between = [(0, 0, space - 1) for space in plan.spacing]
        image = lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *between, (0, 0, 0)])
        sizes = zip(axes, image.shape[1:-1], strict=True)
        axes = tuple(axis._replace(size=size) for axis, size in sizes)
        return products.grouped_weight_gradient(axes, plan.groups, image, cotangent, plan.precision)
    if _by_product(plan, axes, cotangent.dtype, image.shape[-1] >= FEW_CHANNELS):
        return products.weight_gradient(axes, image, cotangent, plan.precision)
    pads = []
    for axis, space in zip(axes, plan.spacing, strict=True):
        reach, extent = axis.dilation * (axis.taps - 1), axis.stride * (axis.out - 1) + 1
        pads.append((axis.low, reach + extent - (space * (axis.size - 1) + 1) - axis.low))
    channels_first, batch_second_last = image.swapaxes(0, -1), jnp.moveaxis(cotangent, 0, -2)
    gradient = _convolution(
        plan, channels_first, batch_second_last, plan.dilation, pads, plan.spacing, plan.strides
    )
    return jnp.moveaxis(gradient, 0, -2)


def _axes(plan: Plan, image: tuple[int, ...], kernel: tuple[int, ...]) -> Axes:
    """The spatial dimensions of an input and a kernel with these shapes."""
    axes = []
    for a, (low, high) in enumerate(plan.pads):
        size, taps, stride, dilation = image[a + 1], kernel[a], plan.strides[a], plan.dilation[a]
        padded = plan.spacing[a] * (size - 1) + 1 + low + high
        out = (padded - dilation * (taps - 1) - 1) // stride + 1
        axes.append(Axis(size, out, taps, stride, dilation, low))
    return tuple(axes)


def _by_product(plan: Plan, axes: Axes, dtype: Any, faster: bool) -> bool:
    """Whether to compute by a matrix product.

    A kernel of one pixel is a matrix, and for float64 XLA:CPU has no fast convolution.
    """
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
