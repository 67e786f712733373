"""A model as two pure functions, and how a Flax module, NNX or Linen, or plain functions become
one."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxlocal.errors import ConfigurationError

Tree = Any

# How Flax's own layers, and modules that are written after them, are told that this is training.
_TRAIN = ("train", "training", "is_training")
_REST = ("deterministic", "use_running_average")

# What a call creates or draws, and no one carries from one call to the next.
_PASSING = nnx.Any(nnx.RngState, nnx.Intermediate)


class Model(NamedTuple):
    """What training needs of a model: two pure functions of plain pytrees."""

    init: Callable[[jax.Array], tuple[Tree, Tree]]  # key -> (params, model_state); {} if no state
    apply: Callable[..., tuple[jax.Array, Tree]]
    # (params, model_state, inputs [batch, ...], key, train) -> (outputs [batch, ...], model_state)


def from_nnx(make_module: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """The model that an NNX module is.

    `params` holds the module's `nnx.Param` variables and `model_state` its other ones, such as
    batch statistics, each as nested dictionaries of arrays. Random streams are kept in neither:
    every `apply` seeds them from its `key`, so that dropout follows the step and the worker that
    the key was folded from. `key` may be None where nothing is drawn. `train`, a Python bool,
    chooses between the module's `train()` and `eval()`.

    Args:
      make_module: builds the module from its random streams; `module(inputs)` gives its outputs.
        It is called by every `init` and by the first `apply`, so it should have no side effects.

    Returns:
      The model; `init` and `apply` are pure and may be jitted, scanned, vmapped and sharded.

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
        return _plain(params), _plain(state)

    def apply(
        params: Tree, model_state: Tree, inputs: jax.Array, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, Tree]:
        graph, of_params, streams, of_state = blueprint()
        filled = _filled(of_params, params), streams, _filled(of_state, model_state)
        module = nnx.merge(graph, *filled, copy=True)
        if key is not None:
            nnx.reseed(module, policy="match_shape", **_stream_keys(streams, key))
        if train:
            module.train()
        else:
            module.eval()
        outputs = module(inputs)
        return outputs, _plain(_split(module)[3])

    return Model(init, apply)


def from_linen(module: linen.Module, inputs: Any, streams: Sequence[str] = ("dropout",)) -> Model:
    """The model that a Linen module is.

    `params` is the module's collection of that name and `model_state` all its other collections,
    such as `batch_stats`, by name. `train` is told by those of the keywords train, training,
    is_training, deterministic and use_running_average that the module's call has and its fields
    leave open.

    Args:
      module: `module(inputs)` gives its outputs.
      inputs: a batch, or what has its shape and dtype, such as a `jax.ShapeDtypeStruct`.
      streams: the random streams to be given a key of their own in each `apply`, folded from its
        `key`; another stream draws from one more key, that of `params`.

    >>> model = from_linen(linen.Dense(2), jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params, model_state = model.init(jax.random.key(0))
    >>> jax.tree.map(jnp.shape, params), model_state
    ({'bias': (2,), 'kernel': (3, 2)}, {})
    """
    shape, dtype = inputs.shape, inputs.dtype
    names = [
        name
        for name in _named(inspect.signature(type(module).__call__), (*_TRAIN, *_REST))
        if getattr(module, name, None) is None
    ]

    def keys(key: jax.Array | None) -> dict[str, jax.Array]:
        if key is None:
            return {}
        return {n: jax.random.fold_in(key, number) for number, n in enumerate(("params", *streams))}

    def told(train: bool) -> dict[str, Any]:
        return {name: train == (name in _TRAIN) for name in names}

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        variables = module.init(key, jnp.zeros(shape, dtype), **told(False))
        state = dict(linen.meta.unbox(variables))
        return state.pop("params", {}), state

    def apply(
        params: Tree, model_state: Tree, inputs: jax.Array, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, Tree]:
        variables = {"params": params, **model_state}
        outputs, changed = module.apply(
            variables, inputs, rngs=keys(key), mutable=list(model_state), **told(train)
        )
        return outputs, {**model_state, **changed}

    return Model(init, apply)


def from_functions(init: Callable, apply: Callable) -> Model:
    """The model that two plain functions are.

    Args:
      init: `init(key)` gives the parameters, any pytree of arrays.
      apply: `apply(params, inputs)` gives the outputs. It is told, by these names, what else it
        asks for: `key`, None where nothing is to be drawn, and `train`, a Python bool. If it asks
        for `model_state`, `init` gives (params, model_state) and `apply` (outputs, model_state).

    Raises:
      ConfigurationError: the functions cannot be called so.

    >>> model = from_functions(lambda key: {"w": jnp.ones(3)}, lambda params, x: x @ params["w"])
    >>> params, model_state = model.init(jax.random.key(0))
    >>> model.apply(params, model_state, jnp.ones((2, 3)), None, train=True)
    (Array([3., 3.], dtype=float32), {})
    """
    _fits("init(key)", init, 1, ())
    names = _fits("apply(params, inputs)", apply, 2, ("key", "train", "model_state"))
    if "model_state" in names:
        begin, step = init, apply
    else:
        begin = lambda key: (init(key), {})
        step = lambda params, inputs, **told: (apply(params, inputs, **told), {})

    def apply_fn(
        params: Tree, model_state: Tree, inputs: jax.Array, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, Tree]:
        offered = {"key": key, "train": train, "model_state": model_state}
        return step(params, inputs, **{name: offered[name] for name in names})

    return Model(begin, apply_fn)


def _fits(form: str, function: Callable, arguments: int, offered: tuple[str, ...]) -> list[str]:
    """Those of the offered keywords that the function takes beside its arguments."""
    try:
        signature = inspect.signature(function)
        names = _named(signature, offered)
        signature.bind(*range(arguments), **dict.fromkeys(names))
    except (TypeError, ValueError) as error:
        more = f", which may also ask for {', '.join(offered)}" if offered else ""
        raise ConfigurationError(
            f"{function!r} cannot be called as {form}{more}: {error}"
        ) from None
    return names


def _named(signature: inspect.Signature, names: Sequence[str]) -> list[str]:
    """Those of the names that the signature has."""
    return [name for name in names if name in signature.parameters]


def _split(module: nnx.Module) -> tuple[Any, ...]:
    """The module's structure, parameters, passing variables and every other variable."""
    return nnx.split(module, nnx.Param, _PASSING, ...)


def _plain(state: nnx.State) -> Tree:
    """Nested dictionaries of arrays with string keys, which sort and are saved everywhere alike."""
    tree: dict[str, Any] = {}
    for path, leaf in nnx.to_flat_state(state):
        *above, name = map(str, path)
        branch = functools.reduce(lambda at, part: at.setdefault(part, {}), above, tree)
        branch[name] = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    return tree


def _filled(state: nnx.State, tree: Tree) -> nnx.State:
    """The state with the values of `tree`, as `_plain` made it."""

    def fill(path: tuple[Any, ...], leaf: Any) -> Any:
        value = functools.reduce(lambda at, part: at[str(part)], path, tree)
        return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value

    return nnx.map_state(fill, state)


def _stream_keys(streams: nnx.State, key: jax.Array) -> dict[str, Any]:
    """A key for each name of a random stream: two streams with one key would draw alike."""
    leaves = [leaf for _, leaf in nnx.to_flat_state(streams)]
    names = sorted({leaf.tag for leaf in leaves if isinstance(leaf, nnx.RngKey)})
    return {name: jax.random.fold_in(key, number) for number, name in enumerate(names)}
