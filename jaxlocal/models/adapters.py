"""Adapters that make a model (two pure functions) from a Flax module or from plain functions."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen import fp8_ops

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.initialization import compiled_init

Tree = Any

# The keywords by which Flax's layers and users' modules distinguish training from evaluation.
_TRUE_IN_TRAINING = ("train", "training", "is_training")
_FALSE_IN_TRAINING = ("deterministic", "use_running_average")


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


def from_linen(module: linen.Module, inputs: Any, streams: Sequence[str] = ("dropout",)) -> Model:
    """Make a model from a Flax Linen module.

    `params` is the module's collection `params`, and `model_state` holds all its other collections,
    such as `batch_stats`, by name. Collections that are only sown into are in neither. `apply`
    passes `train` on by the keywords train, training and is_training, and its negation by
    deterministic and use_running_average: by each of these that the module's `__call__` takes and
    that the module's fields do not fix.

    Args:
      module: `module(inputs)` gives its outputs.
      inputs: a batch of example inputs, or its shape and dtype as a `jax.ShapeDtypeStruct`; a tree
        of these, such as a dictionary, where the module takes one.
      streams: names of random streams. Each `apply` folds a separate key for each of them from its
        `key`; a stream that is not named here draws from the key of the stream `params`.

    Returns:
      The model.

    Raises:
      ConfigurationError: `module` is not a Linen module that can be called with the inputs alone,
        or `inputs` are not arrays or their shapes; raised by `init` for float8 layers.

    >>> model = from_linen(linen.Dense(2), jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params, model_state = model.init(jax.random.key(0))
    >>> jax.tree.map(jnp.shape, params), model_state
    ({'bias': (2,), 'kernel': (3, 2)}, {})
    """
    names = _mode_keywords(module)
    shapes = jax.tree.map(_shape_of, inputs)
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def keys(key: jax.Array | None) -> dict[str, jax.Array]:
        if key is None:
            return {}
        return {n: jax.random.fold_in(key, number) for number, n in enumerate(("params", *streams))}

    def mode(train: bool) -> dict[str, Any]:
        return {name: train == (name in _TRUE_IN_TRAINING) for name in names}

    def only_sown(name: str, variables: Any) -> bool:
        """Whether the module runs without this collection, and does not read it where it is."""
        others = {other: values for other, values in variables.items() if other != name}
        mutable, rngs = [other for other in others if other != "params"], keys(jax.random.key(0))

        def run(collection: Any) -> Any:
            given = {**others, **collection}
            return module.apply(given, zeros(), mutable=mutable, rngs=rngs, **mode(False))

        try:
            jax.eval_shape(run, {})
        except Exception:  # of Flax, or of the module where a variable is missing
            return False
        traced = jax.make_jaxpr(run)({name: variables[name]}).jaxpr
        used = {id(v) for equation in traced.eqns for v in equation.invars}
        used |= set(map(id, traced.outvars))
        return used.isdisjoint(map(id, traced.invars))

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        variables = module.init(key, zeros(), **mode(False))
        if fp8_ops.OVERWRITE_WITH_GRADIENT in variables:
            raise ConfigurationError(
                "the scaling factors of Flax's float8 layers are values that their gradient hands "
                "over, which no optimizer does; take a dtype of 16 bits at least"
            )
        kept = [name for name in variables if name == "params" or not only_sown(name, variables)]
        state = linen.meta.unbox({name: variables[name] for name in kept})
        return state.pop("params", {}), state

    def apply(
        params: Tree, model_state: Tree, inputs: jax.Array, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, Tree]:
        variables = {"params": params, **model_state}
        outputs, changed = module.apply(
            variables, inputs, rngs=keys(key), mutable=list(model_state), **mode(train)
        )
        return outputs, {**model_state, **changed}

    return Model(compiled_init(init), apply)


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
    keywords_taken("init(key)", init, 1, ())
    offered = ("key", "train", "model_state")
    names = keywords_taken("apply(params, inputs)", apply, 2, offered)
    stateful = "model_state" in names

    def init_fn(key: jax.Array) -> tuple[Tree, Tree]:
        return _pair("init(key)", "params", init(key)) if stateful else (init(key), {})

    def apply_fn(
        params: Tree, model_state: Tree, inputs: jax.Array, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, Tree]:
        values = {"key": key, "train": train, "model_state": model_state}
        keywords = {name: values[name] for name in names}
        outputs = apply(params, inputs, **keywords)
        return _pair("apply", "outputs", outputs) if stateful else (outputs, {})

    return Model(init_fn, apply_fn)


def _pair(function: str, first: str, result: Any) -> tuple[Any, Any]:
    # A named tuple of two fields may be a tree of parameters.
    if type(result) is not tuple or len(result) != 2:
        size = f" of {len(result)}" if isinstance(result, tuple) else ""
        raise ConfigurationError(
            f"of a model with model_state {function} must give a tuple ({first}, model_state), got "
            f"{type(result).__name__}{size}"
        )
    return result


def _mode_keywords(module: Any) -> list[str]:
    """The keywords by which a Linen module is told whether it trains."""
    if not isinstance(module, linen.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise ConfigurationError(
            f"from_linen takes a Flax Linen module, such as flax.linen.Dense(2), and got {got}"
        )
    if "__call__" not in dir(type(module)):
        raise ConfigurationError(f"{type(module).__name__} has no __call__(inputs)")
    offered = (*_TRUE_IN_TRAINING, *_FALSE_IN_TRAINING)
    call = functools.partial(type(module).__call__, module)
    names = keywords_taken("module(inputs)", call, 1, offered, type(module).__name__)
    return [name for name in names if getattr(module, name, None) is None]


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    dtype = getattr(x, "dtype", None)
    if not hasattr(x, "shape") or dtype is None or dtype.kind in "USO":
        raise ConfigurationError(
            f"example inputs must be arrays, or shapes such as jax.ShapeDtypeStruct((1, 3), "
            f"'float32'), got {type(x).__name__ if dtype is None else dtype}"
        )
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


def keywords_taken(
    form: str,
    function: Callable[..., Any],
    arguments: int,
    offered: tuple[str, ...],
    name: str = "",
) -> list[str]:
    """The offered keywords that a function takes; an error where it does not take the arguments."""
    try:
        signature = inspect.signature(function)
        names = _taken(signature, offered)
        signature.bind(*range(arguments), **dict.fromkeys(names))
    except (TypeError, ValueError) as error:
        more = f", with or without the keywords {', '.join(offered)}" if offered else ""
        raise ConfigurationError(
            f"{name or repr(function)} cannot be called as {form}{more}: {error}"
        ) from None
    return names


def _taken(signature: inspect.Signature, names: Sequence[str]) -> list[str]:
    """The names that are parameters of the signature."""
    return [name for name in names if name in signature.parameters]
