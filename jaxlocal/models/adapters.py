"""A model as two pure functions, and how any Flax NNX module becomes one."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

Tree = Any

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
    every `apply` seeds them from its `key`, so that dropout follows the tick and the worker that
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
