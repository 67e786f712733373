"""The layers of a model that somebody else wrote, exchanged for those that stay fast in a loop.

A function is traced to its jaxpr; every equation that is a convolution or a maximum over windows
is exchanged for a call of this package's own layer, with the same inputs and outputs, or, where
one layer stands for a whole chain of them, the chain; and the result is run in the function's
place. All else, nested programs included, stays as it was traced.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from jaxlocal.errors import ConfigurationError
from jaxlocal.nn.chains import as_one_layer, find_chains, inputs
from jaxlocal.nn.convolution import conv_general_dilated, why_slow
from jaxlocal.nn.pooling import LARGEST_WINDOW, max_pool
from jaxlocal.types import Tree

# Programs within a program that are nothing but their equations. Of all others, a custom_vjp among
# them, the derivative is not that of their equations.
_TRANSPARENT = ("jit", "closed_call", "remat2", "scan", "while", "cond")
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


class Report(NamedTuple):
    """What `fast_layers` does with the layers of a function, one line for each."""

    fast: list[str]  # "convolution [32, 28, 28, 10] by [5, 5, 10, 20]"
    slow: list[str]  # the same, and the reason: ": batch groups"


def fast_layers(fn: Callable) -> Callable:
    """`fn` with its convolutions and max-poolings made fast where many workers train in a loop.

    For a loss, or a model's `apply`, that is written with plain Flax or `jax.lax` layers:

        grad_fn = jaxlocal.gradients(fast_layers(loss))

    Values and gradients are those of `fn` up to the order of summation. A small convolution of
    stride 1 and padding "SAME", its bias, `jax.nn.relu` and a max-pooling of 2 x 2 become one
    `conv_relu_max_pool` where nothing else reads what lies between them. Layers are found in
    `jax.jit`, `jax.checkpoint`, `lax.scan`, `lax.while_loop` and `lax.cond` too; what a
    `jax.custom_vjp`, `jax.custom_jvp` or `jax.shard_map` holds stays as it is. A warning at each
    trace names the layers that stay slow, and why.

    The rules of `jax.jit` apply: `fn` is traced at each call, so it must be pure, and it belongs
    inside a `jax.jit` or a round, but around the loss and not around its gradient, where there is
    nothing left to derive. Arguments and results that are no JAX arrays (NumPy arrays, Python
    numbers, strings) stay as they are. As `conv_general_dilated`, the result has reverse
    mode, any number of times, and no forward mode: `jax.jvp` raises a TypeError that says so.

    Args:
      fn: any function of pytrees, by position or by keyword.

    Returns:
      A function of the same signature.

    Raises:
      ConfigurationError: when called with an `nnx.Module`, whose changes would be lost.

    >>> from jax import lax
    >>> def loss(kernel, images):
    ...     return lax.conv(images, kernel, (1, 1), "SAME").sum()
    >>> kernel, images = jnp.ones((8, 3, 3, 3)), jnp.ones((2, 3, 6, 6))
    >>> jax.jit(jax.grad(fast_layers(loss)))(kernel, images).shape
    (8, 3, 3, 3)
    """

    @functools.wraps(fn)
    def rewritten(*args, **kwargs):
        program, arrays, result = _trace(fn, args, kwargs)
        report = Report([], [])
        program = _exchange(program, report)
        if report.slow:
            lines = "; ".join(dict.fromkeys(report.slow))
            warnings.warn(f"fast_layers leaves slow: {lines}", stacklevel=2)
        return result(core.jaxpr_as_fun(program)(*arrays))

    return rewritten


def fast_layers_report(fn: Callable, *args: Any, **kwargs: Any) -> Report:
    """Which layers of `fn(*args, **kwargs)` `fast_layers` makes fast, and which it leaves slow.

    Nothing is computed: shapes will do for arrays, as `jax.ShapeDtypeStruct`.

    >>> from jax import lax
    >>> def layer(images, kernel):
    ...     return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", batch_group_count=2)
    >>> fast_layers_report(layer, jnp.ones((2, 3, 6, 6)), jnp.ones((8, 3, 3, 3)))
    Report(fast=[], slow=['convolution [2, 3, 6, 6] by [8, 3, 3, 3]: batch groups'])
    """
    report = Report([], [])
    _exchange(_trace(fn, args, kwargs)[0], report)
    return report


def _trace(fn: Callable, args: tuple, kwargs: dict) -> tuple[Any, list, Callable]:
    """fn's program, the arrays that it is to be run with, and what makes its outputs fn's own."""
    arrays, inputs = _arrays_of((args, kwargs))
    rebuild = []

    def of_arrays(*arrays):
        args, kwargs = inputs(arrays)
        arrays_out, outputs = _arrays_of(fn(*args, **kwargs))
        rebuild.append(outputs)
        return arrays_out

    _check_pure(args, kwargs)
    program = jax.make_jaxpr(of_arrays)(*arrays)
    return program, arrays, rebuild[0]


def _check_pure(*trees: Tree) -> None:
    is_module = lambda x: isinstance(x, nnx.Module)
    for module in filter(is_module, jax.tree.leaves(trees, is_leaf=is_module)):
        raise ConfigurationError(
            f"fast_layers needs a pure function, and a change to the nnx.Module "
            f"{type(module).__name__} would be lost: nnx.split it outside, nnx.merge it inside"
        )


def _arrays_of(tree: Tree) -> tuple[list, Callable[[Any], Tree]]:
    """The tree's JAX arrays, and what puts others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    places = [
        at for at, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    ]

    def rebuild(arrays):
        new = dict(zip(places, arrays, strict=True))
        filled = [new.get(at, leaf) for at, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, filled)

    return [leaves[at] for at in places], rebuild


def _exchange(jaxpr: Any, report: Report) -> Any:
    """The program with its layers exchanged, at all depths; the report is added to."""
    if isinstance(jaxpr, core.Jaxpr):
        return jaxpr.replace(eqns=list(_exchanged(jaxpr, report)))
    return core.ClosedJaxpr(_exchange(jaxpr.jaxpr, report), jaxpr.consts)


def _exchanged(program: core.Jaxpr, report: Report) -> Iterator[core.JaxprEqn]:
    """The program's equations with those of a chain exchanged for one, at the place of its last."""
    chains = {chain.equations[-1]: chain for chain in find_chains(program)}
    before = {eqn for chain in chains.values() for eqn in chain.equations[:-1]}
    for eqn in program.eqns:
        if eqn in chains:
            line = _describe(chains[eqn].equations[0])
            report.fast.append(f"{line} with its relu and pooling")
            yield as_one_layer(chains[eqn])
        elif eqn not in before:
            yield _exchange_equation(eqn, report)


def _exchange_equation(eqn: core.JaxprEqn, report: Report) -> core.JaxprEqn:
    name = eqn.primitive.name
    if name in _LAYERS:
        return _exchange_layer(eqn, report)
    if not _holds_layers(eqn):
        return eqn
    if name in _TRANSPARENT:
        params = {key: _exchange_param(value, report) for key, value in eqn.params.items()}
        return eqn.replace(params=params)
    lines = list(_layers_inside(eqn))
    if _is_own(eqn):
        report.fast.append(lines[0])  # the others are its forms on other backends
    else:
        report.slow.extend(f"{line}: inside {name}" for line in lines)
    return eqn


def _exchange_param(value: Any, report: Report) -> Any:
    if isinstance(value, tuple):
        return tuple(_exchange_param(entry, report) for entry in value)
    return _exchange(value, report) if isinstance(value, core.Jaxpr | core.ClosedJaxpr) else value


def _exchange_layer(eqn: core.JaxprEqn, report: Report) -> core.JaxprEqn:
    """The equation, made a call of our layer if that is fast."""
    layer = _LAYERS[eqn.primitive.name]
    reason = layer.why_slow(eqn)
    if reason:
        report.slow.append(f"{_describe(eqn)}: {reason}")
        return eqn
    assert layer.ours is not None
    report.fast.append(_describe(eqn))
    options = {name: eqn.params[name] for name in layer.options}
    call = functools.partial(layer.ours, **options)
    (ours,) = jax.make_jaxpr(call)(*inputs(eqn)).eqns
    return eqn.replace(primitive=ours.primitive, params=ours.params)


def _holds_layers(eqn: core.JaxprEqn) -> bool:
    return next(_layers_inside(eqn), None) is not None


def _layers_inside(eqn: core.JaxprEqn) -> Iterator[str]:
    for program in core.jaxprs_in_params(eqn.params):
        for inner in program.eqns:
            if inner.primitive.name in _LAYERS:
                yield _describe(inner)
            yield from _layers_inside(inner)


def _is_own(eqn: core.JaxprEqn) -> bool:
    """Whether the equation is a layer of this package, which is fast as it is."""
    folder = Path(__file__).parent
    sources = (p.debug_info.func_filename for p in core.jaxprs_in_params(eqn.params))
    return all(source and Path(source).parent == folder for source in sources)


def _describe(eqn: core.JaxprEqn) -> str:
    if eqn.primitive.name == "conv_general_dilated":
        lhs, rhs = (list(x.shape) for x in inputs(eqn))
        return f"convolution {lhs} by {rhs}"
    of_gradient = eqn.primitive.name == "select_and_scatter_add"
    what = "gradient of a max pooling" if of_gradient else "max pooling"
    return f"{what} {list(inputs(eqn)[0].shape)} by {list(_window(eqn))}"


def _window(eqn: core.JaxprEqn) -> tuple[int, ...]:
    return eqn.params["window_dimensions"]


def _why_slow_convolution(eqn: core.JaxprEqn) -> str:
    """Why `conv_general_dilated` would hand this convolution to `jax.lax`; "" if it would not."""
    if eqn.params["out_sharding"] is not None:
        return "out_sharding"
    lhs, rhs = inputs(eqn)
    return why_slow(lhs, rhs, eqn.params["batch_group_count"])


# In a `jax.jit`, so that it is a single equation, and traced once for equal layers.
_convolution = jax.jit(conv_general_dilated, static_argnames=_OPTIONS)


def _why_slow_pooling(eqn: core.JaxprEqn) -> str:
    """Why `max_pool` would hand this pooling to Flax; "" if it would not."""
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
def _max_pooling(inputs, *, window_dimensions):
    """The maximum over windows side by side along any axes; in a `jax.jit` as a convolution is."""
    pooled = [axis for axis, size in enumerate(window_dimensions) if size > 1] or [0]
    first, end = pooled[0], pooled[-1] + 1
    window, rest = window_dimensions[first:end], inputs.shape[end:]
    channels_last = inputs.reshape(*inputs.shape[:end], math.prod(rest))
    out = max_pool(channels_last, window, window)
    return out.reshape(*out.shape[:-1], *rest)


class _Layer(NamedTuple):
    why_slow: Callable[[core.JaxprEqn], str]
    ours: Callable | None  # None: there is no faster one
    options: tuple[str, ...]  # the equation's parameters that ours takes


_LAYERS = {
    "conv_general_dilated": _Layer(_why_slow_convolution, _convolution, _OPTIONS),
    "select_and_scatter_add": _Layer(_why_slow_gradient, None, ()),
    "reduce_window_max": _Layer(_why_slow_pooling, _max_pooling, ("window_dimensions",)),
}
