"""The state before the first step: all workers equal, and each part on its devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.keys import own_keys
from jaxlocal.parallel.layout import SINGLE, STACKED, Layout
from jaxlocal.parallel.leaves import check_arrays, check_params, dtype_of, is_key, wide
from jaxlocal.parallel.mesh import jit_on, place
from jaxlocal.parallel.sharding import (
    Rule,
    is_sharded,
    named_shardings,
    shardings,
    with_shardings,
)
from jaxlocal.stages.averaged_workers import Leaves, parts_of, with_parts
from jaxlocal.stages.compose import common_axes
from jaxlocal.stages.updates import init_of
from jaxlocal.training.common_state import (
    CommonState,
    common_leaves,
    full_shapes,
    held,
    of_stacked,
)
from jaxlocal.types import Memory, Method, RoundMemory, TrainState, Tree


class States:
    """Make the states of a method on a mesh."""

    def __init__(self, method: Method, layout: Layout, mesh: Mesh, rule: Rule):
        self._method, self._mesh, self._rule = method, mesh, rule
        self.grid = layout.shape
        self._common: dict[Any, Leaves | None] = {}

    def shapes(self, params: Tree, model_state: Tree = None) -> TrainState:
        """Shapes, dtypes and shardings of a state, from parameters or their shapes."""
        shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), dtype_of(x))  # wherever it lies
        given = jax.tree.map(shape, _checked(params, model_state))
        shapes = self._make.eval_shape(*given, jax.random.key(0))
        return with_shardings(shapes, self._shardings(shapes))

    def init(self, params: Tree, key: jax.Array, model_state: Tree) -> TrainState:
        """The state before the first step."""
        if not is_key(key) or key.shape:
            got = f"{jnp.shape(key)} keys" if is_key(key) else type(key).__name__
            raise ConfigurationError(
                f"the root key must be a key from jax.random.key(seed), got {got}"
            )
        given = (*_checked(params, model_state), key)
        everywhere = named_shardings(self._mesh, SINGLE)
        if self._mesh.is_multi_process:
            return self._make(*place(given, everywhere))
        move = lambda x: jax.device_put(x, everywhere) if _lies_elsewhere(x, self._mesh) else x
        return self._make(*jax.tree.map(move, given))

    def keep_shardings(self, state: TrainState) -> TrainState:
        """Constrain a state of sharded workers to its shardings, inside a program."""
        return lax.with_sharding_constraint(state, self._shardings(state))

    @functools.cached_property
    def _make(self):
        method, grid = self._method, self.grid

        def make(params, model_state, key):
            stack = lambda tree: jax.tree.map(
                lambda x: jnp.broadcast_to(x, grid + jnp.shape(x)), tree
            )
            stacked = stack(params)
            initial = functools.partial(init_of, method.optimizer)
            alike = common_axes(method.inner, method.outer) or ()
            opt_state = jax.vmap(jax.vmap(initial))(stacked)
            opt_state = own_keys(opt_state, alike, raw=True)
            model_state = own_keys(stack(model_state))
            anchored = method.inner.anchored or method.outer.anchored
            anchor = jax.tree.map(_wide, params) if anchored else ()
            state = TrainState(stacked, opt_state, model_state, anchor, (), key, jnp.int32(0))
            memory = RoundMemory(method.inner.init(state), method.outer.init(state))
            state = jax.tree.map(_strong, state._replace(memory=memory))
            state = self._alike(state)
            return lax.with_sharding_constraint(state, self._shardings(state))

        return jit_on(self._mesh, make)

    def common_leaves(self, state: TrainState) -> Leaves | None:
        """The leaves of a state that are the same on all workers at the end of a round; None where
        such a state is not held as a `CommonState`."""
        if is_sharded(self._mesh):
            return None
        leaves, structure = jax.tree.flatten(state)
        form = structure, tuple(map(dtype_of, leaves))
        if form not in self._common:
            self._common[form] = common_leaves(self._method, full_shapes(state))
        return self._common[form]

    def at_end(self, state: TrainState) -> TrainState:
        """The shapes of the state after the end of a round, from any state."""
        return jax.eval_shape(self._alike, full_shapes(state))

    def _alike(self, state: TrainState) -> TrainState:
        """What is held of a state of workers that are alike."""
        leaves = self.common_leaves(state)
        if leaves is None:
            return state
        common, own = leaves.split(parts_of(state))
        first = lambda x: x[:1, :1]
        one = with_parts(state, leaves.join(list(map(first, common)), own))
        return CommonState(one._replace(memory=of_stacked(first, state.memory)), self.grid)

    def _shardings(self, state: TrainState) -> TrainState:
        return shardings(self._mesh, self._rule, specs_of(state), state)


def specs_of(state: TrainState) -> TrainState:
    """How the parts of a state are spread over the axes of workers, as a prefix of its tree."""
    is_memory = lambda node: isinstance(node, Memory)
    memory = jax.tree.map(lambda _: Memory(STACKED, SINGLE), state.memory, is_leaf=is_memory)
    specs = TrainState(STACKED, STACKED, STACKED, SINGLE, memory, SINGLE, SINGLE)
    if not isinstance(state, CommonState):
        return specs
    memory = jax.tree.map(lambda _: Memory(SINGLE, SINGLE), held(state).memory, is_leaf=is_memory)
    specs = specs._replace(memory=memory)
    return CommonState(with_parts(specs, specs_of_parts(parts_of(held(state)))), state.grid)


def specs_of_parts(parts: Tree) -> Tree:
    """How leaves are spread of which those of [1, 1, ...] are the same on all workers."""
    return jax.tree.map(lambda x: SINGLE if x.shape[:2] == (1, 1) else STACKED, parts)


def _checked(params: Tree, model_state: Tree) -> tuple[Tree, Tree]:
    """The parts of a model, of leaves that a state may hold; {} where there is no model state."""
    model_state = {} if model_state is None else model_state
    check_params(params)
    check_arrays("model_state", model_state)
    return params, model_state


def _lies_elsewhere(x: Any, mesh: Mesh) -> bool:
    """Whether an array is committed to other devices than those of a mesh."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer) or not x.committed:
        return False
    return getattr(x.sharding, "mesh", None) != mesh


def _wide(x: Any) -> jax.Array:
    """A parameter in the precision of the anchor: half would lose the differences of workers."""
    x = jnp.asarray(x)
    return x.astype(wide(x.dtype))


def _strong(x: jax.Array) -> jax.Array:
    """The array without JAX's weak type, which a round would drop and then compile again."""
    return x if is_key(x) else lax.convert_element_type(x, x.dtype)
