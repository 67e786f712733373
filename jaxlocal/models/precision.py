"""A model that computes in half precision and is kept in float32."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.adapters import Model

Tree = Any


def in_precision(model: Model, dtype: Any) -> Model:
    """The model, computing in another floating type.

    outputs = float32(apply(dtype(params), model_state, dtype(inputs))): parameters, and with them
    gradients, optimizer states and averages, stay what `init` made them, as does `model_state`,
    such as batch statistics. What is no floating point number, such as tokens, stays what it is.

    The layers of a module follow the type of their parameters and inputs unless they were given one
    of their own. Those of Flax NNX that hold to float32 and pass it on are `nnx.BatchNorm` and
    `nnx.Embed`: give them `dtype` where you build them.

    Args:
      model: what to compute.
      dtype: a floating type, `jnp.bfloat16` say. float16 needs a loss that is scaled.

    Raises:
      ConfigurationError: the type is not floating point.

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
        raise ConfigurationError(f"a model computes in a floating type, bfloat16 say, not {dtype}")

    def apply(
        params: Tree, model_state: Tree, inputs: jax.Array, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, Tree]:
        low = _cast(params, dtype), model_state, _cast(inputs, dtype)
        outputs, state = model.apply(*low, key, train)
        state = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), state, model_state)
        return _cast(outputs, jnp.float32), state

    return Model(model.init, apply)


def _cast(tree: Tree, dtype: Any) -> Tree:
    """The tree, with its floating point leaves in that type."""

    def one(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)
