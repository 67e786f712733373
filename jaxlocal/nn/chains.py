"""Find the chains of convolution, bias, relu and max-pooling in a program that can be one layer.

An equation continues a chain if no other equation reads the output of the equation before it. The
rest of the program then reads only the output of the chain's last equation.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxlocal.nn.convolution import why_slow
from jaxlocal.nn.pooled import POOL, conv_relu_max_pool, pays

# The orders whose values and gradients are those of one layer. With the bias after relu or pooling,
# rounding would make other entries equal, and the gradient would go to other ones.
_ORDERS = {
    ("relu", "pool"),
    ("pool", "relu"),
    ("bias", "relu", "pool"),
    ("bias", "pool", "relu"),
}
# Positions of batch, channels, height, width, and for a kernel of out, in, height, width.
_NHWC, _HWIO = (0, 3, 1, 2), (3, 2, 0, 1)

_Readers = dict[Any, list[core.JaxprEqn | None]]  # of each variable; None for a program's output
_Producers = dict[Any, core.JaxprEqn]


class Chain(NamedTuple):
    """Equations that compute max_pool(relu(conv(images, kernel) + bias))."""

    equations: list[core.JaxprEqn]  # the convolution first
    bias: list[Any]  # the variable of the bias, `[out]` with dimensions of 1; [] without a bias


def find_chains(program: core.Jaxpr) -> list[Chain]:
    """Find the chains in a program that are faster as one layer, without nested programs."""
    readers: _Readers = defaultdict(list)
    for eqn in program.eqns:
        for variable in filter(_is_variable, eqn.invars):
            readers[variable].append(eqn)
    for variable in filter(_is_variable, program.outvars):
        readers[variable].append(None)
    producers = {output: eqn for eqn in program.eqns for output in eqn.outvars}
    chains = (_chain(eqn, readers, producers) for eqn in program.eqns if _can_start(eqn))
    return [chain for chain in chains if chain]


def as_one_layer(chain: Chain) -> core.JaxprEqn:
    """The chain's last equation, changed so that it computes the whole chain."""
    first, last = chain.equations[0], chain.equations[-1]
    operands = [*first.invars, *chain.bias]
    call = partial(_conv_relu_max_pool, layout=first.params["dimension_numbers"])
    (fast,) = jax.make_jaxpr(call)(*(operand.aval for operand in operands)).eqns
    return last.replace(invars=operands, primitive=fast.primitive, params=fast.params)


def inputs(eqn: core.JaxprEqn) -> list[Any]:
    """Shapes and dtypes of the equation's operands."""
    return [x.aval for x in eqn.invars]


@jax.jit(static_argnames="layout")
def _conv_relu_max_pool(
    images: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, layout: Any
) -> jax.Array:
    """`conv_relu_max_pool` in any layout; `jax.jit` makes it a single equation."""
    images = jnp.moveaxis(images, layout.lhs_spec, _NHWC)
    kernel = jnp.moveaxis(kernel, layout.rhs_spec, _HWIO)
    outs = kernel.shape[-1]
    bias = jnp.zeros(outs, kernel.dtype) if bias is None else bias.reshape(outs)
    return jnp.moveaxis(conv_relu_max_pool(images, kernel, bias), _NHWC, layout.out_spec)


def _is_variable(operand: Any) -> bool:
    return isinstance(operand, core.Var)


def _can_start(eqn: core.JaxprEqn) -> bool:
    """Whether the equation is a convolution that `conv_relu_max_pool` computes faster."""
    if eqn.primitive.name != "conv_general_dilated":
        return False
    params, (images, kernel) = eqn.params, inputs(eqn)
    if images.ndim != 4 or why_slow(images, kernel, params["batch_group_count"]):
        return False
    layout = params["dimension_numbers"]
    outs, ins, *taps = (kernel.shape[axis] for axis in layout.rhs_spec)
    sides = [images.shape[axis] for axis in layout.lhs_spec[2:]]
    return (
        all({*params[name]} == {1} for name in ("window_strides", "lhs_dilation", "rhs_dilation"))
        and list(params["padding"]) == lax.padtype_to_pads(sides, taps, (1, 1), "SAME")
        and params["feature_group_count"] == 1
        and params["preferred_element_type"] in (None, images.dtype)
        and params["precision"] is params["out_sharding"] is None
        and pays(sides, ins, outs)
    )


def _chain(convolution: core.JaxprEqn, readers: _Readers, producers: _Producers) -> Chain | None:
    """The chain that starts with the convolution, or None."""
    layout = convolution.params["dimension_numbers"]
    equations, bias = [convolution], list[Any]()
    kinds: tuple[str, ...] = ()
    while kinds not in _ORDERS:
        output = equations[-1].outvars[0]
        eqn, *others = readers[output] or [None]
        if eqn is None or others:
            return None
        if eqn.primitive.name == "add":
            bias = _bias(eqn, output, layout.out_spec[1], producers)
        kind = _kind(eqn, layout, bias)
        if not kind or kind in kinds:
            return None
        kinds += (kind,)
        equations.append(eqn)
    return Chain(equations, bias)


def _kind(eqn: core.JaxprEqn, layout: lax.ConvDimensionNumbers, bias: list[Any]) -> str:
    if eqn.primitive.name == "add" and bias:
        return "bias"
    if _is_relu(eqn):
        return "relu"
    return "pool" if _pools(eqn, layout.out_spec[2:]) else ""


def _bias(eqn: core.JaxprEqn, output: Any, axis: int, producers: _Producers) -> list[Any]:
    """The variable that the equation adds to `output`, if it holds one number for each channel.

    The addition broadcasts it, or an earlier equation does.
    """
    added: Any = next(x for x in eqn.invars if x is not output)
    size, shape = output.aval.shape[axis], added.aval.shape
    if not _is_variable(added):
        return []
    if math.prod(shape) == size and shape[axis : axis + 1] == (size,):
        return [added]
    producer = producers.get(added)
    if producer is None or producer.primitive.name != "broadcast_in_dim":
        return []
    (source,), axes = inputs(producer), producer.params["broadcast_dimensions"]
    along = {to for to, n in zip(axes, source.shape, strict=True) if n > 1}
    return [producer.invars[0]] if source.size == size and along <= {axis} else []


def _is_relu(eqn: core.JaxprEqn) -> bool:
    """Whether the equation is `jax.nn.relu`, whose derivative at zero is 0.

    The derivative of `jnp.maximum(x, 0)` is 1/2 there.
    """
    if eqn.primitive.name != "custom_jvp_call":
        return False
    source = eqn.params["call_jaxpr"].jaxpr.debug_info
    in_jax = Path(jax.__file__).parent in Path(source.func_filename or "").parents
    return in_jax and source.func_name == "relu"


def _pools(eqn: core.JaxprEqn, axes: Sequence[int]) -> bool:
    """Whether the equation is a max-pooling of 2 x 2.

    Of equal entries in a window, the first gets the gradient. So the kernel's first dimension must
    also be the first one of the output.
    """
    if eqn.primitive.name != "reduce_window_max" or axes[0] > axes[1]:
        return False
    window = [1] * 4
    for axis, size in zip(axes, POOL, strict=True):
        window[axis] = size
    params = eqn.params
    return (
        list(params["window_dimensions"]) == list(params["window_strides"]) == window
        and {*params["padding"]} == {(0, 0)}
        and {*params["base_dilation"], *params["window_dilation"]} == {1}
    )
