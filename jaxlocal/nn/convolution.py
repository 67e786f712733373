"""A convolution whose gradients stay fast inside a loop on CPU.

XLA:CPU has a fast kernel for one form of convolution, and brings others into that form only in the
entry computation of a program. The weight gradient that JAX derives has another form. Inside
`lax.scan`, where all local training happens, XLA:CPU runs it in a generic loop, thirty times slower
or worse. Here the forward convolution, the input gradient and the weight gradient are written in
forms that are fast in every computation.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.nn import forms
from jaxlocal.nn.forms import Plan
from jaxlocal.parallel.collectives import vary


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
    """Convolution as `jax.lax.conv_general_dilated`, with gradients that are fast in a loop on CPU.

    Flax layers take it as an argument, in NNX and in Linen:
    `nnx.Conv(..., conv_general_dilated=conv_general_dilated)`.

    Fast are one to three spatial dimensions in any layout (channels last, `NHWC` by `HWIO`, needs
    no transposition), with any strides, padding, dilation and feature groups. All other
    convolutions run as in `jax.lax`, for instance those of integers or with batch groups. Values
    and gradients equal those of `jax.lax` up to the order of summation. On other backends than
    CPU, they are those of `jax.lax`.

    The gradients are a `jax.custom_vjp`, which allows reverse mode any number of times, and no
    forward mode (`jax.jvp`, `jax.hessian`).

    Args:
      lhs: input, `[batch, height, width, in]`, or in the layout of `dimension_numbers`.
      rhs: kernel, `[height, width, in, out]`, or in the layout of `dimension_numbers`.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
        batch_group_count, precision, preferred_element_type, out_sharding: as in `jax.lax`.

    Returns:
      The convolved array, with the shape and dtype that `jax.lax` gives it.

    Raises:
      TypeError, ValueError: the same errors as `jax.lax.conv_general_dilated`.

    >>> image, kernel = jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 8))
    >>> layout = ("NHWC", "HWIO", "NHWC")
    >>> conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=layout).shape
    (1, 2, 2, 8)
    """
    plain = partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    if out_sharding is not None or why_slow(lhs, rhs, batch_group_count):
        return plain(lhs, rhs)
    result = jax.eval_shape(plain, lhs, rhs)  # raises the errors of jax.lax
    image, kernel, output = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    lhs, rhs = lhs.transpose(_batch_first(image)), rhs.transpose(_taps_first(kernel))
    ones = (1,) * (lhs.ndim - 2)
    spacing, dilation = tuple(lhs_dilation or ones), tuple(rhs_dilation or ones)
    plan = Plan(
        strides=tuple(map(int, window_strides)),
        pads=_pads(padding, lhs, rhs, window_strides, dilation),
        spacing=spacing,
        dilation=dilation,
        groups=feature_group_count,
        precision=tuple(precision) if isinstance(precision, list) else precision,
        result_type=result.dtype,
    )
    convolved = _convolve(plan, *equally_varying(lhs, rhs))
    return convolved.transpose([_batch_first(output).index(dim) for dim in range(lhs.ndim)])


def why_slow(lhs: Any, rhs: Any, batch_group_count: int = 1) -> str:
    """Reason why `conv_general_dilated` runs a convolution as in `jax.lax`; "" if it is fast.

    Args:
      lhs, rhs: input and kernel, or their shapes and dtypes as `jax.ShapeDtypeStruct`.
      batch_group_count: as in `jax.lax`.

    Returns:
      A few words for a message, such as "batch groups".

    >>> why_slow(jnp.ones((4, 9, 3), int), jnp.ones((2, 3, 5), int))
    'int32 by int32'
    """
    if lhs.dtype != rhs.dtype or not jnp.issubdtype(lhs.dtype, jnp.floating):
        return f"{lhs.dtype} by {rhs.dtype}"
    if lhs.dtype.itemsize == 1:
        return str(lhs.dtype)
    if batch_group_count != 1:
        return "batch groups"
    if not 3 <= len(lhs.shape) <= 5:
        return f"{len(lhs.shape) - 2} spatial dimensions"
    return "an empty array" if 0 in (*lhs.shape, *rhs.shape) else ""


def _batch_first(spec: Sequence[int]) -> list[int]:
    """The dimensions as [batch, *spatial, channels]; JAX's are [batch, channels, *spatial]."""
    return [spec[0], *spec[2:], spec[1]]


def _taps_first(spec: Sequence[int]) -> list[int]:
    """The dimensions of a kernel as [*taps, in, out]; JAX's are [out, in, *taps]."""
    return [*spec[2:], spec[1], spec[0]]


def _pads(
    padding: Any, lhs: jax.Array, rhs: jax.Array, strides: Any, dilation: Any
) -> tuple[tuple[int, int], ...]:
    """The padding before and after each spatial dimension.

    A string never meets a dilated input here: `jax.lax` raises an error for it.
    """
    if not isinstance(padding, str):
        return tuple((int(low), int(high)) for low, high in padding)
    extents = [d * (n - 1) + 1 for d, n in zip(dilation, rhs.shape[:-2], strict=True)]
    return tuple(lax.padtype_to_pads(lhs.shape[1:-1], extents, strides, padding))


def equally_varying(*arrays: jax.Array) -> list[jax.Array]:
    """Cast arrays so that all of them vary over each mesh axis that one of them varies over.

    `jax.shard_map` needs it. The cast stands outside of the custom_vjp, since its transpose sums
    the gradient of an operand that is common to the devices.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    return vary(list(arrays), sorted(frozenset().union(*varying)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(plan: Plan, image: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.platform_dependent(
        image, kernel, cpu=partial(forms.forward, plan), default=partial(forms.plain, plan)
    )


def _forward(plan: Plan, image: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return _convolve(plan, image, kernel), (image, kernel)


def _backward(plan: Plan, saved: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    image, kernel = saved
    plain = partial(forms.plain_gradients, plan)
    if cotangent.size == 0:  # the kernel is larger than the padded image
        return plain(image, kernel, cotangent)
    fast = partial(forms.gradients, plan)
    return lax.platform_dependent(image, kernel, cotangent, cpu=fast, default=plain)


_convolve.defvjp(_forward, _backward)
