"""What the program of a piece of a round runs on each device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.parallel.collectives import alike, consensus_distance, psum, vary
from jaxlocal.parallel.layout import AXES
from jaxlocal.stages.averaged_workers import (
    Averaged,
    Leaves,
    averaged_rows,
    parts_of,
    with_parts,
    with_rows,
)
from jaxlocal.stages.compose import AnySteps, join, repeat
from jaxlocal.training.common_state import CommonState, held, of_stacked
from jaxlocal.training.pieces import Piece, cut
from jaxlocal.types import Context, Info, Leaf, Method, Stage, TrainState, Tree

Body = Callable[[TrainState, Tree, Context], tuple[TrainState, Info]]
DISTANCE = "consensus_distance"  # its name in the report of a measured piece


def body(method: Method, piece: Piece, leaves: Leaves | None, grid: tuple[int, int]) -> Body:
    """The function (state, batches, context) → (state, info) of a piece, on blocks of workers.

    Args:
      method: of the rounds.
      piece: of one round.
      leaves: that are the same on all workers at the end of a round, if it then holds one of each.
      grid: (D, N).
    """
    steps = [("inner", repeat(method.inner, piece.times))] if piece.times else []
    if leaves is not None and piece.ends:
        return _averaged(method, _in_order(steps), piece, leaves, grid)
    return _in_order(steps + [("outer", method.outer)] * piece.ends)


def _in_order(parts: list[tuple[str, Stage]]) -> Body:
    """Stages one after another, each with its part of the memory, and a row for every worker."""

    def run(state, batches, context):
        state = _every_row(state, context)
        infos: list[Info] = []
        start = 0
        for name, stage in parts:
            # Apart from what follows, a stage has the bits that it has as a program of its own.
            state = jax.tree.map(lax.optimization_barrier, state) if infos else state
            own = cut(batches, start, stage.steps)
            memory = getattr(state.memory, name)
            after, memory, info = stage.apply(state._replace(memory=()), memory, own, context)
            state = after._replace(memory=state.memory._replace(**{name: memory}))
            infos.append(info)
            start += stage.steps
        return state, join(infos)

    return run


def _averaged(
    method: Method, in_rows: Body, piece: Piece, leaves: Leaves, grid: tuple[int, int]
) -> Body:
    """Steps of which only the average of the workers is kept, and the end of the round with it."""
    take = method.inner.apply
    assert isinstance(take, AnySteps)

    def run(state, batches, context):
        memory = of_stacked(lambda x: x[:1, :1], held(state).memory)
        if piece.times and isinstance(state, CommonState) and leaves.are_rows(held(state)):
            own = held(state)._replace(memory=())
            after = take.averaged(own, batches, context, piece.times, leaves)
        else:
            state, info = in_rows(state, batches, context)
            after = averaged_rows(state._replace(memory=()), context, leaves, info)
        infos = [after.info]
        if piece.measured:
            infos.append(Info(common={DISTANCE: _distance(after)[None]}))
        with alike():
            one, kept, info = method.outer.apply(after.state, memory.outer, (), after.context)
        common, _ = leaves.split(parts_of(one))
        one = with_parts(one, leaves.join(common, after.rows))
        one = one._replace(memory=memory._replace(outer=kept))
        return CommonState(one, grid), join([*infos, info])

    return run


def _every_row(state: TrainState, context: Context) -> TrainState:
    """The state with a row for every worker of the device."""
    if not isinstance(state, CommonState):
        return state
    rows = lambda x: vary(jnp.broadcast_to(x, context.worker.shape + x.shape[2:]))
    state = held(state)
    return with_rows(state, context)._replace(memory=of_stacked(rows, state.memory))


def _distance(after: Averaged) -> Leaf:
    """The consensus distance of the workers before the end of the round."""
    between = consensus_distance(after.state.params, after.context)
    return jnp.sqrt(psum(after.spread, AXES) + jnp.square(between))
