"""A convolution with its bias, relu and pooling in a program: what may be one layer.

An equation continues a chain if it alone reads what the one before it made, so the chain's last
output is all that the rest of the program knows of it.
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

# A bias after the pooling, or the relu, is none of these: its rounding makes other ties.
_ORDERS = {
    ("relu", "pool"),
    ("pool", "relu"),
    ("bias", "relu", "pool"),
    ("bias", "pool", "relu"),
}
# Where a layout has batch, channels and sides; a kernel's, where it has out, in and taps.
_NHWC, _HWIO = (0, 3, 1, 2), (3, 2, 0, 1)

_Readers = dict[Any, list[core.JaxprEqn | None]]  # of each variable; None is the program's output
_Makers = dict[Any, core.JaxprEqn]


class Chain(NamedTuple):
    """Equations that compute max_pool(relu(conv(images, kernel) + bias))."""

    equations: list[core.JaxprEqn]  # the convolution first
    bias: list[Any]  # the variable that holds it, `[out]` among ones; none without a bias


def find_chains(program: core.Jaxpr) -> list[Chain]:
    """The chains among a program's own equations that pay as one layer."""
    readers: _Readers = defaultdict(list)
    for eqn in program.eqns:
        for variable in filter(_is_variable, eqn.invars):
            readers[variable].append(eqn)
    for variable in filter(_is_variable, program.outvars):
        readers[variable].append(None)
    makers = {made: eqn for eqn in program.eqns for made in eqn.outvars}
    chains = (_chain(eqn, readers, makers) for eqn in program.eqns if _begins(eqn))
    return [chain for chain in chains if chain]


def as_one_layer(chain: Chain) -> core.JaxprEqn:
    """The chain's last equation, made to compute all of it."""
    first, last = chain.equations[0], chain.equations[-1]
    operands = [*first.invars, *chain.bias]
    call = partial(_conv_relu_max_pool, layout=first.params["dimension_numbers"])
    (ours,) = jax.make_jaxpr(call)(*(operand.aval for operand in operands)).eqns
    return last.replace(invars=operands, primitive=ours.primitive, params=ours.params)


def inputs(eqn: core.JaxprEqn) -> list[Any]:
    """The shapes and dtypes of what the equation takes."""
    return [x.aval for x in eqn.invars]


@jax.jit(static_argnames="layout")
def _conv_relu_max_pool(images, kernel, bias=None, *, layout):
    """`conv_relu_max_pool` in any layout; in a `jax.jit`, so that it is a single equation."""
    images = jnp.moveaxis(images, layout.lhs_spec, _NHWC)
    kernel = jnp.moveaxis(kernel, layout.rhs_spec, _HWIO)
    outs = kernel.shape[-1]
    bias = jnp.zeros(outs, kernel.dtype) if bias is None else bias.reshape(outs)
    return jnp.moveaxis(conv_relu_max_pool(images, kernel, bias), _NHWC, layout.out_spec)


def _is_variable(operand: Any) -> bool:
    return isinstance(operand, core.Var)


def _begins(eqn: core.JaxprEqn) -> bool:
    """Whether the equation is a convolution that `conv_relu_max_pool` computes, and fast."""
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


def _chain(convolution: core.JaxprEqn, readers: _Readers, makers: _Makers) -> Chain | None:
    """What follows the convolution, if it is the rest of a chain."""
    layout = convolution.params["dimension_numbers"]
    equations, bias = [convolution], list[Any]()
    kinds: tuple[str, ...] = ()
    while kinds not in _ORDERS:
        made = equations[-1].outvars[0]
        eqn, *others = readers[made] or [None]
        if eqn is None or others:
            return None
        if eqn.primitive.name == "add":
            bias = _bias(eqn, made, layout.out_spec[1], makers)
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


def _bias(eqn: core.JaxprEqn, made: Any, axis: int, makers: _Makers) -> list[Any]:
    """What the equation adds to what was `made`, if it is a number for each place along the axis.

    It is spread by the addition, or before it by an equation of its own.
    """
    added: Any = next(x for x in eqn.invars if x is not made)
    size, shape = made.aval.shape[axis], added.aval.shape
    if not _is_variable(added):
        return []
    if math.prod(shape) == size and shape[axis : axis + 1] == (size,):
        return [added]
    maker = makers.get(added)
    if maker is None or maker.primitive.name != "broadcast_in_dim":
        return []
    (source,), axes = inputs(maker), maker.params["broadcast_dimensions"]
    along = {to for to, n in zip(axes, source.shape, strict=True) if n > 1}
    return [maker.invars[0]] if source.size == size and along <= {axis} else []


def _is_relu(eqn: core.JaxprEqn) -> bool:
    """Whether it is `jax.nn.relu`: the slope of a plain maximum is a half at zero, not zero."""
    if eqn.primitive.name != "custom_jvp_call":
        return False
    source = eqn.params["call_jaxpr"].jaxpr.debug_info
    of_jax = Path(jax.__file__).parent in Path(source.func_filename or "").parents
    return of_jax and source.func_name == "relu"


def _pools(eqn: core.JaxprEqn, axes: Sequence[int]) -> bool:
    """Whether it is our pooling: of equal entries the first has the gradient, so that the kernel's
    first dimension must come first in its output too."""
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
