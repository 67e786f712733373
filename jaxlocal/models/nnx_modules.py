"""The adapter that makes a model of a Flax NNX module."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.adapters import Model, keywords_taken
from jaxlocal.models.initialization import compiled_init
from jaxlocal.models.jaxprs import depends, origin
from jaxlocal.models.module_attributes import check_nothing_hidden, check_unchanged, numbers_of
from jaxlocal.models.random_streams import check_nothing_drawn, counts_of, stream_keys
from jaxlocal.models.variables import quick_rngs
from jaxlocal.parallel.leaves import is_key
from jaxlocal.types import Tree

Path = tuple[Any, ...]
State = Any  # nnx.State

# Variables that no call reads from an earlier call: random streams and sown intermediate values.
_TRANSIENT = nnx.Any(nnx.RngState, nnx.Intermediate)


class _Blueprint(NamedTuple):
    """What a module is without its values."""

    graph: Any  # its structure
    params: State  # shapes
    transient: State  # shapes
    constants: State  # arrays
    state: State  # shapes


def from_nnx(make_module: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Make a model from a Flax NNX module.

    `params` holds the module's `nnx.Param` variables and `model_state` its other variables, such as
    batch statistics, each as nested dictionaries of arrays. Neither holds random streams: every
    `apply` seeds them from its `key`, so dropout differs by step and by worker as the key does.
    `key` may be None where nothing is drawn in training; what is drawn in evaluation is then the
    same in every call. `train`, a Python bool, chooses between the module's `train()` and `eval()`.

    An attribute that is a plain array, such as a mask or a table of positions, is a constant of the
    model, equal on all workers and in neither tree. One that is drawn from `rngs` is kept in
    `model_state`, since it depends on the key of `init`.

    Args:
      make_module: `make_module(rngs)` builds the module, and `module(inputs)` gives its outputs.
        Every `init` and the first `apply` call it, so it should have no side effects.

    Returns:
      The model.

    Raises:
      ConfigurationError: `make_module` is a module that is built already or cannot be called with
        `rngs`. `init` and `apply` raise it where it builds no NNX module, and `apply` where the
        model would not be a function of its arguments: the module's call changes a plain array or
        a number, or draws in training without a key.

    >>> model = from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    >>> params, model_state = model.init(jax.random.key(0))
    >>> jax.tree.map(jax.numpy.shape, params), model_state
    ({'bias': (2,), 'kernel': (3, 2)}, {})
    >>> outputs, _ = model.apply(params, model_state, jax.numpy.ones((5, 3)), None, train=False)
    >>> outputs.shape
    (5, 2)
    """
    _check_makes_modules(make_module)
    _register_tracers()

    parts = _Parts(make_module)

    @functools.cache
    def blueprint() -> _Blueprint:
        return _blueprint(make_module, parts)

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        params, _, _, state = parts.of(key)
        # Here the blueprint is of the same trace; inside a mesh JAX would trace again.
        if constants := _paths(blueprint().constants):
            _, state = nnx.split_state(state, lambda path, _: path in constants, ...)
        return _as_dict(params), _as_dict(state)

    def apply(
        params: Tree, model_state: Tree, inputs: Any, key: jax.Array | None, train: bool
    ) -> tuple[Any, Tree]:
        plan = blueprint()
        module = _filled(plan, params, model_state, key, train)
        constants = _paths(plan.constants)
        before, numbers = _split(module, constants), numbers_of(module)
        counts = counts_of(before.transient)
        outputs = module(inputs)
        after = _split(module, constants)
        check_unchanged(numbers, numbers_of(module))
        if not _are_same(before.constants, after.constants):  # passed on by nnx.jit, or changed
            given = params, model_state, inputs, key, train
            _check_kept(lambda arrays: _arrays_after(plan._replace(constants=arrays), *given), plan)
        if train and key is None:
            check_nothing_drawn(counts, counts_of(after.transient))
        return outputs, _as_dict(after.state, known=_paths(plan.state))

    return Model(compiled_init(init), apply)


def _check_makes_modules(make_module: Any) -> None:
    """Raise ConfigurationError where this is not a function that builds an NNX module."""
    if isinstance(make_module, nnx.Module):
        name = type(make_module).__name__
        raise ConfigurationError(
            f"from_nnx takes a function that builds the module, such as lambda rngs: {name}(..., "
            f"rngs=rngs), and got a {name} that is built already"
        )
    _check_not_linen(make_module)
    kind: Any = make_module
    if not isinstance(kind, type):
        keywords_taken("make_module(rngs)", make_module, 1, ())
        return
    arguments = list(inspect.signature(kind.__init__).parameters)[1:]  # type: ignore[misc]
    if "rngs" in arguments[1:]:  # the first one would be given rngs
        name = kind.__name__
        raise ConfigurationError(
            f"from_nnx calls make_module(rngs), and the first argument of {name} is "
            f"{arguments[0]!r}: give it lambda rngs: {name}(..., rngs=rngs)"
        )


def _check_not_linen(module: Any) -> None:
    kind = module if isinstance(module, type) else type(module)
    if issubclass(kind, linen.Module):
        raise ConfigurationError(
            f"{kind.__name__} is a Flax Linen module: make a model of it by from_linen"
        )


def _built(make_module: Callable[[nnx.Rngs], nnx.Module], key: Any) -> nnx.Module:
    module = make_module(quick_rngs(key))
    _check_not_linen(module)
    if not isinstance(module, nnx.Module) or not callable(module):
        raise ConfigurationError(
            "make_module(rngs) must give an NNX module that can be called, and gave "
            f"{type(module).__name__}"
        )
    return module


@functools.cache
def _register_tracers() -> None:
    """Let Flax see traced arrays as arrays: it takes them for static attributes of a module."""

    def register(kind: Any) -> None:
        for tracer in kind.__subclasses__():
            nnx.register_data_type(tracer)
            register(tracer)

    register(jax.core.Tracer)


class _Parts:
    """The parts of a module but for its structure: one trace serves `init` and the blueprint.

    `of(key)` gives the parameters, transient variables, constants and all other state, traced.
    """

    def __init__(self, make_module: Callable[[nnx.Rngs], nnx.Module]) -> None:
        self.graphs: list[Any] = []  # the structure, from every trace

        def parts(key: jax.Array) -> tuple[State, ...]:
            module = _built(make_module, key)
            check_nothing_hidden(module)
            graph, *states = _split(module)
            self.graphs.append(graph)
            return tuple(states)

        self.of = jax.jit(parts, inline=True)


def _blueprint(make_module: Callable[[nnx.Rngs], nnx.Module], parts: _Parts) -> _Blueprint:
    """The module without its values; nothing is computed but its plain arrays."""
    traced = parts.of.trace(jax.eval_shape(lambda: jax.random.key(0)))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), traced.out_info)
    on_key = jax.tree.unflatten(jax.tree.structure(shapes), depends(traced.jaxpr))
    drawn = {path for path, is_drawn in _leaves(on_key[-1]) if is_drawn is True}
    plain = {path for path, leaf in _leaves(shapes[-1]) if not isinstance(leaf, nnx.Variable)}
    _check_no_key({path: leaf for path, leaf in _leaves(shapes[-1]) if path in drawn & plain})
    params, transient, _, state = shapes
    constants, state = nnx.split_state(state, lambda path, _: path in plain - drawn, ...)
    if plain - drawn:
        constants = _computed(lambda key: _split(_built(make_module, key), plain - drawn).constants)
    return _Blueprint(parts.graphs[0], params, transient, constants, state)


def _check_no_key(drawn: dict[Path, Any]) -> None:
    """Raise ConfigurationError where a key is drawn: a round gives each worker its own."""
    for path, leaf in drawn.items():
        if is_key(leaf):
            raise ConfigurationError(
                f"the module keeps the random key {'.'.join(map(str, path))} that it draws from "
                "rngs: keep rngs itself, or the numbers that are drawn with the key"
            )


def _computed(constants: Callable[[jax.Array], State]) -> State:
    """The plain arrays of a module that do not depend on its key."""
    with jax.ensure_compile_time_eval():  # also where the first use is inside a transformation
        values, again = (jax.jit(lambda key: constants(key))(jax.random.key(0)) for _ in range(2))
        for (name, value), other in zip(
            _by_name(values).items(), _by_name(again).values(), strict=True
        ):
            may_be_nan = bool(jnp.issubdtype(value.dtype, jnp.inexact))
            if not jnp.array_equal(value, other, equal_nan=may_be_nan):
                raise ConfigurationError(
                    f"the array {name} of the module differs each time that the module is built: "
                    "draw it from rngs, as make_module is given them"
                )
    return values


def _are_same(before: State, after: State) -> bool:
    arrays = _by_name(after)
    return all(arrays.get(name) is array for name, array in _by_name(before).items())


def _arrays_after(plan: _Blueprint, params: Any, model_state: Any, inputs: Any, *mode: Any) -> Any:
    """The constants of the module after a call."""
    module = _filled(plan, params, model_state, *mode)
    module(inputs)
    return _split(module, _paths(plan.constants)).constants


def _check_kept(call: Callable[[State], State], plan: _Blueprint) -> None:
    """Raise ConfigurationError where a call gives back other constants than it is given."""
    traced = jax.make_jaxpr(call)(plan.constants).jaxpr
    before = dict(zip(_by_name(plan.constants), traced.invars, strict=True))
    after = [origin(traced, variable) for variable in traced.outvars]
    check_unchanged(before, dict(zip(before, after, strict=True)))


def _filled(
    plan: _Blueprint, params: Tree, model_state: Tree, key: jax.Array | None, train: bool
) -> Any:
    """The module with these values, in this mode, and its random streams seeded from the key."""
    states = _with_values(plan.params, params), _with_values(plan.state, model_state)
    module = nnx.merge(plan.graph, states[0], plan.transient, plan.constants, states[1], copy=True)
    nnx.reseed(module, policy="match_shape", **stream_keys(plan.transient, key))
    if train:
        module.train()
    else:
        module.eval()
    return module


def _split(module: nnx.Module, constants: set[Path] | frozenset[Path] = frozenset()) -> _Blueprint:
    """The module's structure, parameters, transient variables, constants and all other state."""
    is_constant = lambda path, leaf: path in constants
    graph, *states = nnx.split(module, nnx.Param, _TRANSIENT, is_constant, ...)
    return _Blueprint(graph, *states)


def _leaves(state: State) -> list[tuple[Path, Any]]:
    return list(nnx.to_flat_state(state))


def _paths(state: State) -> set[Path]:
    return {path for path, _ in _leaves(state)}


def _by_name(state: State) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf for path, leaf in _leaves(state)}


def _as_dict(state: State, known: set[Path] | None = None) -> Tree:
    """Nested dictionaries of arrays with string keys, which sort the same way in every file.

    Args:
      known: where given, plain arrays and sown tuples at other paths are left out.
    """
    tree: dict[str, Any] = {}
    for path, leaf in _leaves(state):
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        added = known is not None and path not in known
        if added and (value is leaf or isinstance(value, tuple)):
            continue
        *above, name = map(str, path)
        branch = functools.reduce(lambda at, part: at.setdefault(part, {}), above, tree)
        branch[name] = value
    return tree


def _with_values(state: State, tree: Tree) -> State:
    """The state with the values of `tree`, the inverse of `_as_dict`."""

    def fill(path: Path, leaf: Any) -> Any:
        try:
            value = functools.reduce(lambda at, part: at[str(part)], path, tree)
        except (KeyError, TypeError):
            name = ".".join(map(str, path))
            raise ConfigurationError(f"the module has {name}, which it is not given") from None
        return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value

    return nnx.map_state(fill, state)
