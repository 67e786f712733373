"""Mixed precision: a model that computes in half precision and keeps its parameters in float32."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.adapters import Model

Tree = Any


def in_precision(model: Model, dtype: Any) -> Model:
    """Make a model compute in half precision, with parameters and model state in float32.

    outputs = float32(apply(dtype(params), model_state, dtype(inputs))). Parameters keep the dtype
    that `init` gives them, and so do gradients, optimizer states, averages and the model state,
    such as batch statistics. Integers, such as tokens, are not cast.

    The layers of a module compute in the dtype of their parameters and inputs, unless the module
    fixes another one. Of Flax NNX, `nnx.BatchNorm` and `nnx.Embed` give float32 to all later
    layers: pass `dtype` to them where you build them. A product with an array that a module holds,
    such as a mask in float32, has the wider type of both.

    Args:
      model: the model, in float32.
      dtype: a floating-point dtype, such as `jnp.bfloat16`. float16 needs a scaled loss.

    Returns:
      The model in mixed precision; its outputs are float32.

    Raises:
      ConfigurationError: `dtype` is not floating-point.

    >>> from jaxlocal.models import build
    >>> model = in_precision(build("logistic", (3,), 2), "bfloat16")
    >>> params, model_state = model.init(jax.random.key(0))
    >>> outputs, _ = model.apply(params, model_state, jnp.ones((5, 3)), None, train=False)
    >>> params["map"]["kernel"].dtype, outputs.dtype
    (dtype('float32'), dtype('float32'))

    Reference: P. Micikevicius et al., Mixed Precision Training, ICLR 2018,
    https://arxiv.org/abs/1710.03740.
    """
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ConfigurationError(
            f"a model computes in a floating-point dtype such as bfloat16, not {dtype}"
        )

    def apply(
        params: Tree, model_state: Tree, inputs: jax.Array, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, Tree]:
        low = _cast(params, dtype), model_state, _cast(inputs, dtype)
        with jax.numpy_dtype_promotion("standard"):  # normalisations compute in float32
            outputs, state = model.apply(*low, key, train)
        state = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), state, model_state)
        return _cast(outputs, jnp.float32), state

    return Model(model.init, apply)


def _cast(tree: Tree, dtype: Any) -> Tree:
    """The tree with its floating-point leaves in this dtype."""

    def one(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)
