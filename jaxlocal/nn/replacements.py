"""The fast layer that replaces one convolution, max-pooling or dense layer of a program."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxlocal.nn.chains import inputs
from jaxlocal.nn.convolution import conv_general_dilated, why_slow
from jaxlocal.nn.dense import dot_general, pays
from jaxlocal.nn.pooling import LARGEST_WINDOW, max_pool

_OPTIONS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "precision",
    "preferred_element_type",
)

_DENSE = ("dimension_numbers", "precision", "preferred_element_type")


def reason_slow(eqn: core.JaxprEqn) -> str:
    """Reason why no fast layer replaces the equation, a key of `LAYERS`; "" if one does."""
    return LAYERS[eqn.primitive.name].why_slow(eqn)


def as_fast_layer(eqn: core.JaxprEqn) -> core.JaxprEqn:
    """The equation, changed so that it calls the fast layer."""
    layer = LAYERS[eqn.primitive.name]
    assert layer.fast is not None
    options = {name: eqn.params[name] for name in layer.options}
    call = functools.partial(layer.fast, **options)
    (fast,) = jax.make_jaxpr(call)(*inputs(eqn)).eqns
    return eqn.replace(primitive=fast.primitive, params=fast.params)


def is_dense(eqn: core.JaxprEqn) -> bool:
    """Whether the equation is a matrix product whose weight gradient the fast layer changes."""
    if eqn.primitive.name != "dot_general" or eqn.params["out_sharding"] is not None:
        return False
    lhs, rhs = inputs(eqn)
    return pays(lhs, rhs, eqn.params["dimension_numbers"])


def as_fast_dense(eqn: core.JaxprEqn) -> core.JaxprEqn:
    """The product, changed so that it calls the fast layer."""
    call = functools.partial(_dense, **{name: eqn.params[name] for name in _DENSE})
    (fast,) = jax.make_jaxpr(call)(*inputs(eqn)).eqns
    return eqn.replace(primitive=fast.primitive, params=fast.params)


def describe(eqn: core.JaxprEqn) -> str:
    """The layer and its shapes, for a report."""
    if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
        lhs, rhs = (list(x.shape) for x in inputs(eqn))
        kind = "dense layer" if eqn.primitive.name == "dot_general" else "convolution"
        return f"{kind} {lhs} by {rhs}"
    is_gradient = eqn.primitive.name == "select_and_scatter_add"
    layer = "gradient of a max pooling" if is_gradient else "max pooling"
    return f"{layer} {list(inputs(eqn)[0].shape)} by {list(_window(eqn))}"


def _window(eqn: core.JaxprEqn) -> tuple[int, ...]:
    return eqn.params["window_dimensions"]


def _why_slow_convolution(eqn: core.JaxprEqn) -> str:
    """Reason why `conv_general_dilated` would run as in `jax.lax`; "" if it is fast."""
    if eqn.params["out_sharding"] is not None:
        return "out_sharding"
    lhs, rhs = inputs(eqn)
    return why_slow(lhs, rhs, eqn.params["batch_group_count"])


# `jax.jit` makes them single equations, which are traced once for equal layers.
_convolution = jax.jit(conv_general_dilated, static_argnames=_OPTIONS)
_dense = jax.jit(dot_general, static_argnames=_DENSE)


def _why_slow_pooling(eqn: core.JaxprEqn) -> str:
    """Reason why `max_pool` would run as in Flax; "" if it is fast."""
    params = eqn.params
    if set(params["base_dilation"]) | set(params["window_dilation"]) != {1}:
        return "dilation"
    if params["window_strides"] != _window(eqn):
        return "windows that overlap or leave gaps"
    if any(pair != (0, 0) for pair in params["padding"]):
        return "padding"
    dtype, entries = inputs(eqn)[0].dtype, math.prod(_window(eqn))
    if not jnp.issubdtype(dtype, jnp.floating):
        return str(dtype)
    return "" if entries <= LARGEST_WINDOW else f"a window of {entries} entries"


def _why_slow_gradient(eqn: core.JaxprEqn) -> str:
    return "fast_layers belongs around the loss"


@functools.partial(jax.jit, static_argnames="window_dimensions")
def _max_pooling(inputs: jax.Array, *, window_dimensions: tuple[int, ...]) -> jax.Array:
    """The maximum over windows along any axes; `jax.jit` makes it a single equation."""
    pooled = [axis for axis, size in enumerate(window_dimensions) if size > 1] or [0]
    first, end = pooled[0], pooled[-1] + 1
    window, rest = window_dimensions[first:end], inputs.shape[end:]
    channels_last = inputs.reshape(*inputs.shape[:end], math.prod(rest))
    out = max_pool(channels_last, window, window)
    return out.reshape(*out.shape[:-1], *rest)


class Layer(NamedTuple):
    """What may replace the equations of one primitive."""

    why_slow: Callable[[core.JaxprEqn], str]  # the reason why it does not; "" if it does
    fast: Callable[..., jax.Array] | None  # the fast layer; None if there is none
    options: tuple[str, ...]  # the equation's parameters that the fast layer takes


LAYERS = {
    "conv_general_dilated": Layer(_why_slow_convolution, _convolution, _OPTIONS),
    "select_and_scatter_add": Layer(_why_slow_gradient, None, ()),
    "reduce_window_max": Layer(_why_slow_pooling, _max_pooling, ("window_dimensions",)),
}
