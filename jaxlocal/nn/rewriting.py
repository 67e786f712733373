"""Replace the layers of a loss that is already written by layers that stay fast in a loop.

A function is traced to its jaxpr. Each equation that is a convolution, a max-pooling or a dense
layer that this package makes faster is replaced by a call of its layer, with the same inputs and
outputs, and so is each chain of them that one layer computes. The result runs in place of the
function. All other equations stay as they were traced. Nested programs are treated alike.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
from flax import nnx
from jax.extend import core

from jaxlocal.errors import ConfigurationError
from jaxlocal.nn.chains import as_one_layer, find_chains
from jaxlocal.nn.replacements import (
    LAYERS,
    as_fast_dense,
    as_fast_layer,
    describe,
    is_dense,
    reason_slow,
)
from jaxlocal.types import Tree

F = TypeVar("F", bound=Callable[..., Any])

# Nested programs whose derivative is that of their equations, unlike that of a custom_vjp.
_TRANSPARENT = ("jit", "closed_call", "remat2", "scan", "while", "cond")


class Report(NamedTuple):
    """The layers of a function that `fast_layers` makes fast or leaves slow, one line for each."""

    fast: list[str]  # "convolution [32, 28, 28, 10] by [5, 5, 10, 20]"
    slow: list[str]  # the same, and the reason: ": batch groups"


def fast_layers(fn: F) -> F:
    """Make convolutions, max-poolings and dense layers of a loss fast in a compiled loop on CPU.

    It takes a loss, or a model's `apply`, that is written with plain Flax or `jax.lax` layers:

        grad_fn = jaxlocal.gradients(fast_layers(loss))

    Values and gradients are those of `fn` up to the order of summation. A small convolution with
    stride 1 and padding "SAME", its bias, `jax.nn.relu` and a max-pooling of 2 x 2 become one
    `conv_relu_max_pool` where nothing else reads the values between them. Layers are also found in
    `jax.jit`, `jax.checkpoint`, `lax.scan`, `lax.while_loop` and `lax.cond`, but not in
    `jax.custom_vjp`, `jax.custom_jvp` and `jax.shard_map`. A warning at each trace names the layers
    that stay slow, with the reason.

    The rules of `jax.jit` apply. `fn` is traced at each call, so it must be pure, and the result
    should be called in a `jax.jit` or in a round. Apply `fast_layers` to the loss, not to its
    gradient, which holds the derived layers already. Arguments and results that are not JAX arrays
    (NumPy arrays, Python numbers, strings) are passed on unchanged. The result allows reverse mode
    any number of times and no forward mode: `jax.jvp` raises a TypeError.

    Args:
      fn: a function of pytrees, with any positional and keyword arguments.

    Returns:
      A function with the same signature.

    Raises:
      ConfigurationError: the result is called with an `nnx.Module`, whose changes would be lost.

    >>> import jax.numpy as jnp
    >>> from jax import lax
    >>> def loss(kernel, images):
    ...     return lax.conv(images, kernel, (1, 1), "SAME").sum()
    >>> kernel, images = jnp.ones((8, 3, 3, 3)), jnp.ones((2, 3, 6, 6))
    >>> jax.jit(jax.grad(fast_layers(loss)))(kernel, images).shape
    (8, 3, 3, 3)
    """

    @functools.wraps(fn)
    def rewritten(*args: Any, **kwargs: Any) -> Any:
        program, arrays, result = _trace(fn, args, kwargs)
        report = Report([], [])
        program = _replace(program, report)
        if report.slow:
            lines = "; ".join(dict.fromkeys(report.slow))
            warnings.warn(f"fast_layers leaves slow: {lines}", stacklevel=2)
        return result(core.jaxpr_as_fun(program)(*arrays))

    return cast(F, rewritten)


def fast_layers_report(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """List the layers of a function that `fast_layers` makes fast, and those that it leaves slow.

    Args:
      fn: the function, as for `fast_layers`.
      *args, **kwargs: its arguments. Nothing is computed, so shapes as `jax.ShapeDtypeStruct` may
        stand for arrays.

    Returns:
      The report: `fast` and `slow`, one line for each layer.

    >>> import jax.numpy as jnp
    >>> from jax import lax
    >>> def layer(images, kernel):
    ...     return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", batch_group_count=2)
    >>> fast_layers_report(layer, jnp.ones((2, 3, 6, 6)), jnp.ones((8, 3, 3, 3)))
    Report(fast=[], slow=['convolution [2, 3, 6, 6] by [8, 3, 3, 3]: batch groups'])
    """
    report = Report([], [])
    _replace(_trace(fn, args, kwargs)[0], report)
    return report


def _trace(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, list[Any], Callable[[Any], Any]]:
    """A function's jaxpr, its array arguments, and a function from output arrays to its result."""
    arrays, arguments_from = _arrays_of((args, kwargs))
    rebuild = []

    def of_arrays(*arrays: jax.Array) -> list[Any]:
        args, kwargs = arguments_from(arrays)
        arrays_out, result_from = _arrays_of(fn(*args, **kwargs))
        rebuild.append(result_from)
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


def _arrays_of(tree: Tree) -> tuple[list[Any], Callable[[Any], Tree]]:
    """The tree's JAX arrays, and a function that puts other arrays in their place."""
    leaves, structure = jax.tree.flatten(tree)
    places = [
        at for at, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    ]

    def rebuild(arrays: Any) -> Tree:
        new = dict(zip(places, arrays, strict=True))
        filled = [new.get(at, leaf) for at, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, filled)

    return [leaves[at] for at in places], rebuild


def _replace(jaxpr: Any, report: Report) -> Any:
    """The program with its layers replaced at all depths; it adds lines to the report."""
    if isinstance(jaxpr, core.Jaxpr):
        return jaxpr.replace(eqns=list(_replaced(jaxpr, report)))
    return core.ClosedJaxpr(_replace(jaxpr.jaxpr, report), jaxpr.consts)


def _replaced(program: core.Jaxpr, report: Report) -> Iterator[core.JaxprEqn]:
    """The program's equations, with one equation for each chain in place of the chain's last."""
    chains = {chain.equations[-1]: chain for chain in find_chains(program)}
    before = {eqn for chain in chains.values() for eqn in chain.equations[:-1]}
    for eqn in program.eqns:
        if eqn in chains:
            line = describe(chains[eqn].equations[0])
            report.fast.append(f"{line} with its relu and pooling")
            yield as_one_layer(chains[eqn])
        elif eqn not in before:
            yield _replace_equation(eqn, report)


def _replace_equation(eqn: core.JaxprEqn, report: Report) -> core.JaxprEqn:
    name = eqn.primitive.name
    if name in LAYERS:
        return _replace_layer(eqn, report)
    if is_dense(eqn):
        report.fast.append(describe(eqn))
        return as_fast_dense(eqn)
    if _is_own_dense(eqn):
        report.fast.append(describe(next(_inside(eqn))))
        return eqn
    if not _holds_layers(eqn):
        return eqn
    if name in _TRANSPARENT:
        params = {key: _replace_param(value, report) for key, value in eqn.params.items()}
        return eqn.replace(params=params)
    lines = list(_layers_inside(eqn))
    if _is_own(eqn):
        report.fast.append(lines[0])  # the other lines are its forms on other backends
    else:
        report.slow.extend(f"{line}: inside {name}" for line in lines)
    return eqn


def _replace_param(value: Any, report: Report) -> Any:
    if isinstance(value, tuple):
        return tuple(_replace_param(entry, report) for entry in value)
    return _replace(value, report) if isinstance(value, core.Jaxpr | core.ClosedJaxpr) else value


def _replace_layer(eqn: core.JaxprEqn, report: Report) -> core.JaxprEqn:
    """A call of this package's layer in place of the equation, where that is fast."""
    if reason := reason_slow(eqn):
        report.slow.append(f"{describe(eqn)}: {reason}")
        return eqn
    report.fast.append(describe(eqn))
    return as_fast_layer(eqn)


def _holds_layers(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive.name in _TRANSPARENT:
        return any(map(_is_layer, _inside(eqn)))
    return next(_layers_inside(eqn), None) is not None


def _is_layer(eqn: core.JaxprEqn) -> bool:
    """Whether a report has a line for the equation, or for one that it holds."""
    own = is_dense(eqn) or _is_own_dense(eqn)
    return own or eqn.primitive.name in LAYERS or _holds_layers(eqn)


def _layers_inside(eqn: core.JaxprEqn) -> Iterator[str]:
    for inner in _inside(eqn):
        if inner.primitive.name in LAYERS:
            yield describe(inner)
        yield from _layers_inside(inner)


def _inside(eqn: core.JaxprEqn) -> Iterator[core.JaxprEqn]:
    for program in core.jaxprs_in_params(eqn.params):
        yield from program.eqns


def _is_own_dense(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive.name != "custom_jvp_call" or not _is_own(eqn):
        return False
    return next(_inside(eqn)).primitive.name == "dot_general"


def _is_own(eqn: core.JaxprEqn) -> bool:
    """Whether the equation is a layer of this package, which is fast already."""
    folder = Path(__file__).parent
    sources = (p.debug_info.func_filename for p in core.jaxprs_in_params(eqn.params))
    return all(source and Path(source).parent == folder for source in sources)
