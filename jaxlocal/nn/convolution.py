"""A convolution whose gradients stay fast inside a loop on CPU.

XLA:CPU brings a convolution into the form that it has a fast kernel for only where it stands in the
entry computation. The weight gradient that JAX derives is in another form, so inside `lax.scan`,
where all local training happens, it runs in a generic loop, some thirty times slower or worse. Here
all three convolutions, forward, input gradient and weight gradient, are written in the fast form.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.workers import vary

CANONICAL = ("NHWC", "HWIO", "NHWC")
Pads = tuple[tuple[int, int], ...]


class _Plan(NamedTuple):
    """What is static about one convolution."""

    strides: tuple[int, int]
    pads: Pads
    precision: Any
    result_type: Any  # preferred_element_type


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, with gradients that are fast inside a loop on CPU.

    Give it to a Flax layer: `nnx.Conv(..., conv_general_dilated=conv_general_dilated)`. In two
    dimensions with channels last, `[batch, height, width, in]` by `[height, width, in, out]`, and
    without dilation and groups, gradients are fast; every other convolution is handed to `jax.lax`
    unchanged. Values and gradients equal those of `jax.lax` up to the order of summation; off the
    CPU the gradients *are* those of `jax.lax`.

    The fast gradients are a `jax.custom_vjp`: reverse mode may be applied again, forward mode
    (`jax.jvp`, `jax.hessian`) may not.

    Args:
      lhs: input, `[batch, height, width, in]` where the fast gradients apply.
      rhs: kernel, `[height, width, in, out]` where they apply.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
        batch_group_count, precision, preferred_element_type, out_sharding: as in `jax.lax`.

    Returns:
      The convolved array, as `jax.lax.conv_general_dilated` gives it.

    Raises:
      Whatever `jax.lax.conv_general_dilated` raises for these arguments.

    >>> image, kernel = jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 8))
    >>> layout = ("NHWC", "HWIO", "NHWC")
    >>> conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=layout).shape
    (1, 2, 2, 8)
    """
    rest = (feature_group_count, batch_group_count, out_sharding)
    plain = rest == (1, 1, None) and _all_ones(lhs_dilation) and _all_ones(rhs_dilation)
    if not (plain and _fits(lhs, rhs, window_strides, dimension_numbers)):
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    precision = tuple(precision) if isinstance(precision, list) else precision
    down, across = window_strides
    plan = _Plan((int(down), int(across)), pads, precision, preferred_element_type)
    return _convolve(plan, *_equally_varying(lhs, rhs))


def _all_ones(dilation: Sequence[int] | None) -> bool:
    return dilation is None or all(factor == 1 for factor in dilation)


def _fits(lhs: jax.Array, rhs: jax.Array, strides: Sequence[int], dimension_numbers: Any) -> bool:
    if lhs.ndim != 4 or rhs.ndim != 4 or len(strides) != 2 or 0 in lhs.shape + rhs.shape:
        return False
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    canonical = lax.conv_dimension_numbers(lhs.shape, rhs.shape, CANONICAL)
    floating = lhs.dtype == rhs.dtype and jnp.issubdtype(lhs.dtype, jnp.floating)
    return floating and numbers == canonical and lhs.shape[3] == rhs.shape[2]


def _equally_varying(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, all varying over every mesh axis of `jax.shard_map` that any of them varies over.

    Outside the custom_vjp, so that the cast's own transpose sums the gradient of a common operand.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    return vary(list(arrays), sorted(frozenset().union(*varying)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(plan: _Plan, image: jax.Array, kernel: jax.Array) -> jax.Array:
    return _canonical(plan, image, kernel, plan.strides, plan.pads)


def _forward(plan: _Plan, image: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return _convolve(plan, image, kernel), (image, kernel)


def _backward(plan: _Plan, saved: Any, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    image, kernel = saved
    if slope.size == 0:  # a convolution with an empty kernel is no convolution
        return _lax_gradients(plan, image, kernel, slope)
    return lax.platform_dependent(
        image, kernel, slope, cpu=partial(_gradients, plan), default=partial(_lax_gradients, plan)
    )


_convolve.defvjp(_forward, _backward)


def _canonical(
    plan: _Plan,
    lhs: jax.Array,
    rhs: jax.Array,
    strides: tuple[int, int],
    pads: Any,
    **dilation: Any,
) -> jax.Array:
    return lax.conv_general_dilated(
        lhs,
        rhs,
        strides,
        pads,
        dimension_numbers=CANONICAL,
        precision=plan.precision,
        preferred_element_type=plan.result_type,
        **dilation,
    )


def _lax_gradients(
    plan: _Plan, image: jax.Array, kernel: jax.Array, slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    convolve = partial(_canonical, plan, strides=plan.strides, pads=plan.pads)
    return jax.vjp(convolve, image, kernel)[1](slope)


def _gradients(
    plan: _Plan, image: jax.Array, kernel: jax.Array, slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    to_image = _input_gradient(plan, image.shape, kernel.astype(slope.dtype), slope)
    to_kernel = _weight_gradient(plan, kernel.shape, image.astype(slope.dtype), slope)
    return to_image.astype(image.dtype), to_kernel.astype(kernel.dtype)


def _input_gradient(
    plan: _Plan, shape: tuple[int, ...], kernel: jax.Array, slope: jax.Array
) -> jax.Array:
    """Spread the slopes to the strides they came from, and convolve them with the turned kernel."""
    pads = []
    for axis, ((low, _), stride) in enumerate(zip(plan.pads, plan.strides, strict=True)):
        reach = kernel.shape[axis] - 1
        spread = (slope.shape[axis + 1] - 1) * stride + 1
        pads.append((reach - low, shape[axis + 1] + low - spread))
    turned = lax.rev(kernel, (0, 1)).transpose(0, 1, 3, 2)
    return _canonical(plan, slope, turned, (1, 1), pads, lhs_dilation=plan.strides)


def _weight_gradient(
    plan: _Plan, shape: tuple[int, ...], image: jax.Array, slope: jax.Array
) -> jax.Array:
    """Convolve the input with the slopes, its channels in place of its batch and vice versa."""
    pads = []
    for axis, ((low, _), stride) in enumerate(zip(plan.pads, plan.strides, strict=True)):
        spread = (slope.shape[axis + 1] - 1) * stride + 1
        pads.append((low, shape[axis] - 1 + spread - image.shape[axis + 1] - low))
    channels_first, batch_third = image.transpose(3, 1, 2, 0), slope.transpose(1, 2, 0, 3)
    gradient = _canonical(
        plan, channels_first, batch_third, (1, 1), pads, rhs_dilation=plan.strides
    )
    return gradient.transpose(1, 2, 0, 3)
