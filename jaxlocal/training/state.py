"""The state before the first step: all workers equal, and each part on its devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.layout import SINGLE, STACKED, Layout
from jaxlocal.parallel.mesh import place
from jaxlocal.parallel.sharding import Rule, named_shardings, shardings, with_shardings
from jaxlocal.types import Memory, Method, RoundMemory, TrainState, Tree


class States:
    """Make the states of a method on a mesh."""

    def __init__(self, method: Method, layout: Layout, mesh: Mesh, rule: Rule):
        self._method, self._layout, self._mesh, self._rule = method, layout, mesh, rule

    def shapes(self, params: Tree, model_state: Tree = None) -> TrainState:
        """Shapes, dtypes and shardings of a state, from parameters or their shapes."""
        shapes = self._make.eval_shape(params, _or_empty(model_state), jax.random.key(0))
        return with_shardings(shapes, self._shardings(shapes))

    def init(self, params: Tree, key: jax.Array, model_state: Tree) -> TrainState:
        """The state before the first step."""
        typed = jnp.issubdtype(getattr(key, "dtype", np.dtype(object)), jax.dtypes.prng_key)
        if not typed or key.shape:
            got = f"{jnp.shape(key)} keys" if typed else type(key).__name__
            raise ConfigurationError(
                f"the root key must be a key from jax.random.key(seed), got {got}"
            )
        given = (params, _or_empty(model_state), key)
        return self._make(
            *(place(given, named_shardings(self._mesh, SINGLE)) if self._spans else given)
        )

    def keep_shardings(self, state: TrainState) -> TrainState:
        """Constrain a state of sharded workers to its shardings, inside a program."""
        return lax.with_sharding_constraint(state, self._shardings(state))

    @property
    def _spans(self) -> bool:
        return self._mesh.is_multi_process

    @functools.cached_property
    def _make(self):
        method, grid = self._method, self._layout.shape

        def make(params, model_state, key):
            stack = lambda tree: jax.tree.map(
                lambda x: jnp.broadcast_to(x, grid + jnp.shape(x)), tree
            )
            stacked = stack(params)
            opt_state = jax.vmap(jax.vmap(method.optimizer.init))(stacked)
            anchored = method.inner.anchored or method.outer.anchored
            anchor = jax.tree.map(_wide, params) if anchored else ()
            state = TrainState(
                stacked, opt_state, stack(model_state), anchor, (), key, jnp.int32(0)
            )
            memory = RoundMemory(method.inner.init(state), method.outer.init(state))
            state = jax.tree.map(_strong, state._replace(memory=memory))
            return lax.with_sharding_constraint(state, self._shardings(state))

        return jax.jit(make)

    def _shardings(self, state: TrainState) -> TrainState:
        return shardings(self._mesh, self._rule, specs_of(state), state)


def specs_of(state: TrainState) -> TrainState:
    """How the parts of a state are spread over the axes of workers, as a prefix of its tree."""
    is_memory = lambda node: isinstance(node, Memory)
    memory = jax.tree.map(lambda _: Memory(STACKED, SINGLE), state.memory, is_leaf=is_memory)
    return TrainState(STACKED, STACKED, STACKED, SINGLE, memory, SINGLE, SINGLE)


def _or_empty(model_state: Tree) -> Tree:
    return {} if model_state is None else model_state


def _wide(x: Any) -> jax.Array:
    """A parameter in the precision of the anchor: half would lose the differences of workers."""
    x = jnp.asarray(x)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if is_float else x


def _strong(x: jax.Array) -> jax.Array:
    """The array without JAX's weak type, which a round would drop and then compile again."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x if is_key else lax.convert_element_type(x, x.dtype)
