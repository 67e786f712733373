"""Adapters that make a model (two pure functions) from a Flax module or from plain functions."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxlocal.errors import ConfigurationError

Tree = Any

# The keywords by which Flax's layers and users' modules distinguish training from evaluation.
_TRUE_IN_TRAINING = ("train", "training", "is_training")
_FALSE_IN_TRAINING = ("deterministic", "use_running_average")

# Variables that no call reads from an earlier call: random streams and sown intermediate values.
_TRANSIENT = nnx.Any(nnx.RngState, nnx.Intermediate)


class Model(NamedTuple):
    """A model as two pure functions of pytrees, which may be jitted, scanned, vmapped and sharded.

    - `init(key)` gives (params, model_state); model_state is {} where there is none.
    - `apply(params, model_state, inputs, key, train)` gives (outputs, model_state). Inputs and
      outputs lead with [batch]; `key` may be None where nothing is drawn at random; `train` is a
      Python bool.

    >>> model = Model(
    ...     init=lambda key: (jnp.ones(3), {}),
    ...     apply=lambda params, model_state, inputs, key, train: (inputs @ params, model_state),
    ... )
    >>> params, model_state = model.init(jax.random.key(0))
    >>> model.apply(params, model_state, jnp.ones((2, 3)), None, True)
    (Array([3., 3.], dtype=float32), {})
    """

    init: Callable[[jax.Array], tuple[Tree, Tree]]
    apply: Callable[..., tuple[jax.Array, Tree]]


def from_nnx(make_module: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Make a model from a Flax NNX module.

    `params` holds the module's `nnx.Param` variables and `model_state` its other variables, such as
    batch statistics, each as nested dictionaries of arrays. Neither holds random streams: every
    `apply` seeds them from its `key`, so dropout differs by step and by worker as the key does.
    `key` may be None where nothing is drawn. `train`, a Python bool, chooses between the module's
    `train()` and `eval()`.

    Args:
      make_module: `make_module(rngs)` builds the module, and `module(inputs)` gives its outputs.
        Every `init` and the first `apply` call it, so it should have no side effects.

    Returns:
      The model.

    >>> model = from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    >>> params, model_state = model.init(jax.random.key(0))
    >>> jax.tree.map(jax.numpy.shape, params), model_state
    ({'bias': (2,), 'kernel': (3, 2)}, {})
    >>> outputs, _ = model.apply(params, model_state, jax.numpy.ones((5, 3)), None, train=False)
    >>> outputs.shape
    (5, 2)
    """

    @functools.cache
    def blueprint() -> tuple[Any, ...]:
        return _split(nnx.eval_shape(lambda: make_module(nnx.Rngs(0))))

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        _, params, _, state = _split(make_module(nnx.Rngs(key)))
        return _as_dict(params), _as_dict(state)

    def apply(
        params: Tree, model_state: Tree, inputs: jax.Array, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, Tree]:
        graph, param_shapes, streams, state_shapes = blueprint()
        filled = _filled(param_shapes, params), streams, _filled(state_shapes, model_state)
        module = nnx.merge(graph, *filled, copy=True)
        if key is not None:
            nnx.reseed(module, policy="match_shape", **_stream_keys(streams, key))
        if train:
            module.train()
        else:
            module.eval()
        outputs = module(inputs)
        return outputs, _as_dict(_split(module)[3])

    return Model(init, apply)


def from_linen(module: linen.Module, inputs: Any, streams: Sequence[str] = ("dropout",)) -> Model:
    """Make a model from a Flax Linen module.

    `params` is the module's collection `params`, and `model_state` holds all its other collections,
    such as `batch_stats`, by name. `apply` passes `train` on by the keywords train, training and
    is_training, and its negation by deterministic and use_running_average: by each of these that
    the module's `__call__` takes and that the module's fields do not fix.

    Args:
      module: `module(inputs)` gives its outputs.
      inputs: a batch of example inputs, or its shape and dtype as a `jax.ShapeDtypeStruct`.
      streams: names of random streams. Each `apply` folds a separate key for each of them from its
        `key`; a stream that is not named here draws from the key of the stream `params`.

    Returns:
      The model.

    >>> model = from_linen(linen.Dense(2), jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params, model_state = model.init(jax.random.key(0))
    >>> jax.tree.map(jnp.shape, params), model_state
    ({'bias': (2,), 'kernel': (3, 2)}, {})
    """
    shape, dtype = inputs.shape, inputs.dtype
    names = [
        name
        for name in _taken(
            inspect.signature(type(module).__call__), (*_TRUE_IN_TRAINING, *_FALSE_IN_TRAINING)
        )
        if getattr(module, name, None) is None
    ]

    def keys(key: jax.Array | None) -> dict[str, jax.Array]:
        if key is None:
            return {}
        return {n: jax.random.fold_in(key, number) for number, n in enumerate(("params", *streams))}

    def mode(train: bool) -> dict[str, Any]:
        return {name: train == (name in _TRUE_IN_TRAINING) for name in names}

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        variables = module.init(key, jnp.zeros(shape, dtype), **mode(False))
        state = dict(linen.meta.unbox(variables))
        return state.pop("params", {}), state

    def apply(
        params: Tree, model_state: Tree, inputs: jax.Array, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, Tree]:
        variables = {"params": params, **model_state}
        outputs, changed = module.apply(
            variables, inputs, rngs=keys(key), mutable=list(model_state), **mode(train)
        )
        return outputs, {**model_state, **changed}

    return Model(init, apply)


def from_functions(init: Callable[[jax.Array], Any], apply: Callable[..., Any]) -> Model:
    """Make a model from two plain functions.

    Args:
      init: `init(key)` gives the parameters, any pytree of arrays.
      apply: `apply(params, inputs)` gives the outputs. It may take further arguments by these
        names: `key`, which is None where nothing is drawn at random, `train`, a Python bool, and
        `model_state`. With `model_state`, `init` gives (params, model_state) and `apply` gives
        (outputs, model_state).

    Returns:
      The model.

    Raises:
      ConfigurationError: `init` or `apply` cannot be called with these arguments.

    >>> model = from_functions(lambda key: {"w": jnp.ones(3)}, lambda params, x: x @ params["w"])
    >>> params, model_state = model.init(jax.random.key(0))
    >>> model.apply(params, model_state, jnp.ones((2, 3)), None, train=True)
    (Array([3., 3.], dtype=float32), {})
    """
    _keywords_taken("init(key)", init, 1, ())
    offered = ("key", "train", "model_state")
    names = _keywords_taken("apply(params, inputs)", apply, 2, offered)
    if "model_state" in names:
        stateful_init, stateful_apply = init, apply
    else:
        stateful_init = lambda key: (init(key), {})
        stateful_apply = lambda params, inputs, **keywords: (apply(params, inputs, **keywords), {})

    def apply_fn(
        params: Tree, model_state: Tree, inputs: jax.Array, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, Tree]:
        values = {"key": key, "train": train, "model_state": model_state}
        keywords = {name: values[name] for name in names}
        outputs, new_state = stateful_apply(params, inputs, **keywords)
        return outputs, new_state

    return Model(stateful_init, apply_fn)


def _keywords_taken(
    form: str, function: Callable[..., Any], arguments: int, offered: tuple[str, ...]
) -> list[str]:
    """The offered keywords that a function takes; an error where it does not take the arguments."""
    try:
        signature = inspect.signature(function)
        names = _taken(signature, offered)
        signature.bind(*range(arguments), **dict.fromkeys(names))
    except (TypeError, ValueError) as error:
        more = f", with or without the keywords {', '.join(offered)}" if offered else ""
        raise ConfigurationError(
            f"{function!r} cannot be called as {form}{more}: {error}"
        ) from None
    return names


def _taken(signature: inspect.Signature, names: Sequence[str]) -> list[str]:
    """The names that are parameters of the signature."""
    return [name for name in names if name in signature.parameters]


def _split(module: nnx.Module) -> tuple[Any, ...]:
    """The module's structure, parameters, transient variables and all other variables."""
    return nnx.split(module, nnx.Param, _TRANSIENT, ...)


def _as_dict(state: nnx.State[Any, Any]) -> Tree:
    """Nested dictionaries of arrays with string keys, which sort the same way in every file."""
    tree: dict[str, Any] = {}
    for path, leaf in nnx.to_flat_state(state):
        *above, name = map(str, path)
        branch = functools.reduce(lambda at, part: at.setdefault(part, {}), above, tree)
        branch[name] = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    return tree


def _filled(state: nnx.State[Any, Any], tree: Tree) -> nnx.State[Any, Any]:
    """The state with the values of `tree`, the inverse of `_as_dict`."""

    def fill(path: tuple[Any, ...], leaf: Any) -> Any:
        value = functools.reduce(lambda at, part: at[str(part)], path, tree)
        return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value

    return nnx.map_state(fill, state)


def _stream_keys(streams: nnx.State[Any, Any], key: jax.Array) -> dict[str, Any]:
    """A separate key for each name of a random stream, so that no two draw the same numbers."""
    leaves = [leaf for _, leaf in nnx.to_flat_state(streams)]
    names = sorted({leaf.tag for leaf in leaves if isinstance(leaf, nnx.RngKey)})
    return {name: jax.random.fold_in(key, number) for number, name in enumerate(names)}
