"""The state of workers that are alike: it holds one row of what is the same on all of them."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxlocal.parallel.layout import SINGLE, STACKED
from jaxlocal.parallel.leaves import dtype_of, is_averaged, wide
from jaxlocal.stages.averaged_workers import PARTS, Leaves, parts_of
from jaxlocal.stages.compose import AnySteps, OfAverage
from jaxlocal.training.names import named_leaves
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

    params = property(lambda self: every_row(held(self).params, self.grid))
    opt_state = property(lambda self: every_row(held(self).opt_state, self.grid))
    model_state = property(lambda self: every_row(held(self).model_state, self.grid))
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


def as_saved(shapes: TrainState, saved: Mapping[str, str]) -> TrainState:
    """The shapes of a state in the form in which it was saved: at the end of a round or in the
    middle of one, or by a method that holds other leaves once.

    Args:
      shapes: of a state of this run.
      saved: dtype and shape of every saved leaf by its name, see `names.described`.
    """
    whole = full_shapes(shapes)
    grid = jax.tree.leaves(whole.params)[0].shape[:2]
    found, once = [], []
    for name, x in named_leaves(whole).items():
        row = f"{x.dtype}{[1, 1, *x.shape[2:]]}"
        once.append(x.shape[:2] == grid != (1, 1) and saved.get(name) == row)
        found.append(_once(x) if once[-1] else x)
    state = jax.tree.unflatten(jax.tree.structure(whole), found)
    return CommonState(state, grid) if any(once) else state


def _once(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """One row of a leaf, on all devices."""
    place = NamedSharding(x.sharding.mesh, SINGLE) if x.sharding else None
    return jax.ShapeDtypeStruct((1, 1, *x.shape[2:]), x.dtype, sharding=place)


def common_leaves(method: Method, shapes: TrainState) -> Leaves | None:
    """The leaves of a state that are the same on all workers at the end of a round.

    None where the end of a round needs more of the workers than their average, where half precision
    would round the average, or where there is one worker.

    Args:
      method: of the rounds.
      shapes: of a state with a row for every worker.
    """
    inner, outer = method.inner.apply, method.outer.apply
    if not (isinstance(inner, AnySteps) and isinstance(outer, OfAverage)):
        return None
    marks = outer.common(shapes)
    leaves, structure = jax.tree.flatten(parts_of(shapes))
    if marks is None or not all(jax.tree.leaves(marks[0])) or leaves[0].shape[:2] == (1, 1):
        return None
    flags = jax.tree.leaves(marks)
    averaged = [x for x, common in zip(leaves, flags, strict=True) if common and is_averaged(x)]
    return None if any(x.dtype != wide(x.dtype) for x in averaged) else Leaves(structure, flags)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    placed = isinstance(x, jax.Array | jax.ShapeDtypeStruct) and not isinstance(x, jax.core.Tracer)
    return jax.ShapeDtypeStruct(jnp.shape(x), dtype_of(x), sharding=x.sharding if placed else None)


def every_row(tree: Tree, grid: tuple[int, int]) -> Tree:
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
    place = _of_workers(x.sharding)
    if not x.size:  # JAX shards what it broadcasts of an empty array wrongly
        return jnp.empty(shape, x.dtype, device=place)
    return x if x.is_deleted() else _broadcast(shape, place)(x)


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
