"""The state of workers that are alike: it holds one row of what is the same on all of them."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxlocal.parallel.layout import STACKED
from jaxlocal.parallel.leaves import dtype_of, is_averaged, wide
from jaxlocal.stages.averaged_workers import PARTS, Leaves, parts_of
from jaxlocal.stages.compose import AnySteps
from jaxlocal.types import Memory, Method, TrainState, Tree


class CommonState(TrainState):
    """A TrainState at the end of a round after which all workers have the same model.

    To its user it is a TrainState: `state.params` has leaves [D, N, ...], which are made when they
    are asked for. What it holds, and what `jax.tree` sees, are leaves [1, 1, ...] of what is the
    same on all workers, so that its memory does not grow with their number.

    Args:
      held: the fields of a TrainState, with those leaves.
      grid: (D, N).

    >>> row = {"w": jnp.ones((1, 1, 3))}
    >>> held = TrainState(row, (), {}, (), (), jax.random.key(0), np.int32(0))
    >>> state = CommonState(held, (1, 1000))
    >>> state.params["w"].shape, jax.tree.leaves(state)[0].shape
    ((1, 1000, 3), (1, 1, 3))
    """

    grid: tuple[int, int]

    def __new__(cls, held: Iterable[Tree], grid: tuple[int, int]) -> "CommonState":
        self = super().__new__(cls, *held)
        self.grid = grid
        return self

    def __iter__(self) -> Iterator[Tree]:
        return (getattr(self, name) for name in self._fields)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index]

    def __reduce__(self) -> tuple:
        return CommonState, (tuple(held(self)), self.grid)

    def _replace(self, **fields: Tree) -> TrainState:  # type: ignore[override]
        if not fields.keys() & {*PARTS, "memory"}:
            return CommonState(held(self)._replace(**fields), self.grid)
        return TrainState(*self)._replace(**fields)

    params = property(lambda self: _rows(held(self).params, self.grid))
    opt_state = property(lambda self: _rows(held(self).opt_state, self.grid))
    model_state = property(lambda self: _rows(held(self).model_state, self.grid))
    memory = property(lambda self: of_stacked(lambda x: _row(x, self.grid), held(self).memory))


def held(state: TrainState) -> TrainState:
    """What a state holds, as a plain tuple: of a common one with leaves [1, 1, ...]."""
    return TrainState(*tuple.__iter__(state)) if isinstance(state, CommonState) else state


def held_as(state: TrainState, fields: TrainState) -> TrainState:
    """The state of those fields, a common one where `state` is one."""
    return CommonState(fields, state.grid) if isinstance(state, CommonState) else fields


def of_stacked(fn: Callable, memory: Tree) -> Tree:
    """Map a function over the leaves of a memory that belong to workers."""
    is_memory = lambda node: isinstance(node, Memory)
    one = lambda node: Memory(jax.tree.map(fn, node.stacked), node.single)
    return jax.tree.map(one, memory, is_leaf=is_memory)


def models_of(state: TrainState) -> tuple[Tree, Tree]:
    """The parameters and the model state that a state holds."""
    return held(state).params, held(state).model_state


def full_shapes(state: TrainState) -> TrainState:
    """The shapes of a state with a row for every worker, from a state or its shapes."""
    if not isinstance(state, CommonState):
        return state
    return TrainState(*jax.tree.map(_shape, state))


def common_leaves(method: Method, shapes: TrainState) -> Leaves | None:
    """The leaves of a state that are the same on all workers at the end of a round.

    None where the end of a round needs more of the workers than their average, where half precision
    would round the average, or where there is one worker.

    Args:
      method: of the rounds.
      shapes: of a state with a row for every worker.
    """
    of = method.outer.common
    marks = of(shapes) if of and isinstance(method.inner.apply, AnySteps) else None
    leaves, structure = jax.tree.flatten(parts_of(shapes))
    if marks is None or not all(jax.tree.leaves(marks[0])) or leaves[0].shape[:2] == (1, 1):
        return None
    flags = jax.tree.leaves(marks)
    averaged = [x for x, common in zip(leaves, flags, strict=True) if common and is_averaged(x)]
    return None if any(x.dtype != wide(x.dtype) for x in averaged) else Leaves(structure, flags)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    placed = isinstance(x, jax.Array | jax.ShapeDtypeStruct) and not isinstance(x, jax.core.Tracer)
    return jax.ShapeDtypeStruct(jnp.shape(x), dtype_of(x), sharding=x.sharding if placed else None)


def _rows(tree: Tree, grid: tuple[int, int]) -> Tree:
    """A tree with leaves [D, N, ...] for those of [1, 1, ...]; what is no array stays."""
    return jax.tree.map(lambda x: _row(x, grid), tree)


def _row(x: Any, grid: tuple[int, int]) -> Any:
    if getattr(x, "shape", ())[:2] != (1, 1):
        return x
    shape = (*grid, *x.shape[2:])
    if isinstance(x, np.ndarray):
        return np.broadcast_to(x, shape)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=_of_workers(x.sharding))
    if isinstance(x, jax.core.Tracer):
        return jnp.broadcast_to(x, shape)
    return x if x.is_deleted() else _broadcast(shape, _of_workers(x.sharding))(x)


def _of_workers(sharding: Any) -> Any:
    """How the rows of all workers lie on the mesh of a leaf."""
    return NamedSharding(sharding.mesh, STACKED) if isinstance(sharding, NamedSharding) else None


@functools.cache
def _broadcast(shape: tuple[int, ...], sharding: Any) -> Any:
    return jax.jit(lambda x: jnp.broadcast_to(x, shape), out_shardings=sharding)


def _flatten(state: CommonState) -> tuple[list[tuple[Any, Tree]], tuple[int, int]]:
    keys = map(jax.tree_util.GetAttrKey, TrainState._fields)
    return list(zip(keys, held(state), strict=True)), state.grid


jax.tree_util.register_pytree_with_keys(
    CommonState, _flatten, lambda grid, fields: CommonState(fields, grid)
)
