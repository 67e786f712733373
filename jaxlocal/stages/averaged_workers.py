"""Workers that start alike take their steps one after another, and only their average is kept."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.parallel.collectives import vary
from jaxlocal.parallel.leaves import is_averaged
from jaxlocal.types import Context, Info, Leaf, TrainState, Tree

PARTS = ("params", "opt_state", "model_state")  # what a worker's steps change


class Averaged(NamedTuple):
    """What is left of the workers of a device after some steps.

    An average by weight over `state` and `context` of all devices is that over all workers.
    """

    state: TrainState  # of one worker, leaves [1, 1, ...]: the average, and its own leaves
    context: Context  # of that worker, which has the weight of all
    rows: list[Leaf]  # [d, n, ...]: what each worker keeps
    spread: Leaf  # Σ a_i ‖x_i − x̄‖² of the parameters from their average
    info: Info


class Leaves:
    """The leaves of the `PARTS` of a state: some will be the same on all workers at the end of a
    round, others are each worker's own.

    Args:
      structure: of (params, opt_state, model_state).
      common: which leaves are the same, in the order of the tree.
    """

    def __init__(self, structure: jax.tree_util.PyTreeDef, common: Sequence[bool]) -> None:
        self.structure, self._common = structure, common

    def are_rows(self, state: TrainState) -> bool:
        """Whether a state holds one row of each leaf that is the same, and all rows of others."""
        rows = [x.shape[:2] == (1, 1) for x in jax.tree.leaves(parts_of(state))]
        return rows == list(self._common)

    def split(self, parts: Tree) -> tuple[list[Leaf], list[Leaf]]:
        """Those that are the same, and each worker's own."""
        marked = list(zip(self._common, jax.tree.leaves(parts), strict=True))
        return [x for common, x in marked if common], [x for common, x in marked if not common]

    def join(self, common: Sequence[Leaf], own: Sequence[Leaf]) -> Tree:
        """(params, opt_state, model_state) of what `split` gives."""
        parts = {True: iter(common), False: iter(own)}
        return self.structure.unflatten([next(parts[common]) for common in self._common])


class _Mean(NamedTuple):
    """The average of some workers."""

    weight: Leaf  # theirs together
    leaves: list[Leaf]
    spread: Leaf  # Σ a_i ‖x_i − x̄‖²


def averaged_workers(
    take: Callable, state: TrainState, context: Context, steps: int, leaves: Leaves
) -> Averaged:
    """Take steps with each worker of a device in turn, and keep the average of where they end.

        m ← m + (a_i / Σ_{j ≤ i} a_j) (x_i − m)

    So memory and cache hold one model, whatever the number of workers. Where workers end alike, m
    is where they end to the bit.

    Args:
      take: `take(params, opt_state, model_state, place, worker, rate)`, all steps of the worker at
        a place, gives the three after them and its metrics [steps].
      state: leaves [1, 1, ...] of what is the same on all workers, and [d, n, ...] of their own.
      context: of the round.
      steps: how many.
      leaves: which are the same.
    """
    start, own = leaves.split(parts_of(state))
    start, own = [vary(x[0, 0]) for x in start], list(map(_flat, own))

    def one(carry: tuple, worker: tuple) -> tuple[tuple, Tree]:
        mean, own = carry
        place, number, weight, rate = worker
        row = [lax.dynamic_index_in_dim(x, place, 0, keepdims=False) for x in own]
        *after, metrics = take(*leaves.join(start, row), place, number, rate)
        ended, row = leaves.split(tuple(after))
        put = lambda x, new: lax.dynamic_update_index_in_dim(x, new, place, 0)
        mean = _add(mean, ended, len(jax.tree.leaves(state.params)), weight)
        return vary((mean, [*map(put, own, row)])), metrics

    who = (context.worker, context.weight, context.rate)
    who = (jnp.arange(context.worker.size), *map(_flat, who))
    (mean, own), metrics = lax.scan(one, vary((_none(start, context.weight), own)), who)
    grid = context.worker.shape
    own = [x.reshape(grid + x.shape[1:]) for x in own]
    metrics = jax.tree.map(lambda x: x.T.reshape(-1, *grid), metrics)
    after = state._replace(step=state.step + steps)
    return _averaged(after, context, leaves, mean, own, Info(metrics))


def averaged_rows(state: TrainState, context: Context, leaves: Leaves, info: Info) -> Averaged:
    """The average of workers that have taken their steps, on a CPU with the bits of
    `averaged_workers`.

    Args:
      state: leaves [d, n, ...].
      context: of the round.
      leaves: which are averaged.
      info: what was reported of the steps.
    """
    common, own = leaves.split(parts_of(state))
    params, rows = len(jax.tree.leaves(state.params)), list(map(_flat, common))
    # A loop over workers is many small programs to an accelerator.
    average = _in_turn if jax.default_backend() == "cpu" else _at_once
    mean = average(rows, params, _flat(context.weight))
    return _averaged(state, context, leaves, mean, own, info)


def parts_of(state: TrainState) -> tuple[Tree, Tree, Tree]:
    """(params, opt_state, model_state)."""
    return state.params, state.opt_state, state.model_state


def with_parts(state: TrainState, parts: Tree) -> TrainState:
    """The state with other (params, opt_state, model_state)."""
    return state._replace(**dict(zip(PARTS, parts, strict=True)))


def with_rows(state: TrainState, context: Context) -> TrainState:
    """The state with a row of every leaf for every worker of the device, [d, n, ...]."""
    grid = context.worker.shape
    rows = lambda x: vary(jnp.broadcast_to(x, grid + x.shape[2:]))
    return with_parts(state, jax.tree.map(rows, parts_of(state)))


def _flat(x: Leaf) -> Leaf:
    return None if x is None else x.reshape((x.shape[0] * x.shape[1],) + x.shape[2:])


def _none(like: list[Leaf], weight: Leaf) -> _Mean:
    """The average of no worker."""
    zero = jnp.zeros((), weight.dtype)
    return _Mean(zero, jax.tree.map(jnp.zeros_like, like), zero)


def _in_turn(rows: list[Leaf], params: int, weight: Leaf) -> _Mean:
    """The average of workers, leaves [workers, ...], one after another."""
    add = lambda mean, worker: (vary(_add(mean, worker[0], params, worker[1])), None)
    return lax.scan(add, vary(_none([x[0] for x in rows], weight)), (rows, weight))[0]


def _at_once(rows: list[Leaf], params: int, weight: Leaf) -> _Mean:
    """The same average up to rounding, by products; where workers are alike, to the bit."""
    total = weight.sum()

    def mean(x):
        off = (x - x[:1]).reshape(len(x), x[0].size)
        share = (weight / total).astype(x.dtype)
        return x[0] + jnp.dot(share, off, precision="highest").reshape(x.shape[1:])

    means = [mean(x) if is_averaged(x) else x[-1] for x in rows]
    parts = list(zip(rows, means, strict=True))[:params]
    square = lambda x, m: jnp.square(x - m[None]).reshape(len(x), m.size).sum(1)
    off = sum(square(x, m).astype(weight.dtype) for x, m in parts)
    return _Mean(total, means, (weight * off).sum())


def _add(mean: _Mean, ended: list[Leaf], params: int, weight: Leaf) -> _Mean:
    """The average with one more worker.

    Args:
      mean: before.
      ended: the leaves of the worker; of what is no floating-point number the last worker counts.
      params: how many of them are parameters; they come first.
      weight: a_i.
    """
    # Apart from the steps before, the sum has the same bits in all programs.
    ended = lax.optimization_barrier(ended)
    total, first = mean.weight + weight, mean.weight == 0

    def moved(m, x):
        share = (weight / total).astype(m.dtype)
        return jnp.where(first, x, m + share * (x - m)) if is_averaged(x) else x

    after = list(map(moved, mean.leaves, ended))
    parts = list(zip(ended, mean.leaves, after, strict=True))[:params]
    off = sum(((x - m) * (x - n)).sum().astype(mean.spread.dtype) for x, m, n in parts)
    return _Mean(total, after, mean.spread + weight * off)


def _averaged(
    state: TrainState, context: Context, leaves: Leaves, mean: _Mean, own: list[Leaf], info: Info
) -> Averaged:
    common = [x[None, None] for x in mean.leaves]
    one = with_parts(state, leaves.join(common, [x[:1, :1] for x in own]))
    first = lambda x: None if x is None else x[:1, :1]
    as_one = Context(
        worker=first(context.worker),
        weight=mean.weight[None, None],
        hub_share=first(context.hub_share),
        rate=first(context.rate),
        data=context.data,
    )
    return Averaged(one, as_one, own, mean.spread, info)
