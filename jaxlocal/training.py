"""The host's side of a run: which ticks are dispatched when, what was said by then, and how good
the average model is."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlocal import periods, workers
from jaxlocal.errors import ConfigurationError
from jaxlocal.rounds import WORLD, RoundFn
from jaxlocal.types import Info, Messages, Rounds, TrainState, Tree
from jaxlocal.workers import AXES, STACKED

# Dispatches that may be under way before the host looks at what the oldest of them reported.
_AHEAD = 2


class Diverged(ArithmeticError):
    """A worker's loss is NaN or infinite."""

    def __init__(self, tick: int, worker: int, loss: float):
        super().__init__(f"the loss of worker {worker} is {loss} at tick {tick}")
        self.tick, self.worker, self.loss = tick, worker, loss


class Step(NamedTuple):
    """Where a run stands after a dispatch. The state is donated to the next one: use it before."""

    state: TrainState
    tick: int
    round: int  # rounds that have ended
    local_steps: (
        int  # H of the round that is under way or has just ended; of the first round at tick 0
    )
    messages: Messages  # said so far
    loss: float  # mean over workers and ticks of the newest losses that have come back; NaN before
    due: bool  # whether a measurement is due
    distance: float  # if so, the consensus distance; before the synchronisation, if one took place


class Dispatch(NamedTuple):
    """A piece of a round that goes to the device at once."""

    start: int
    ticks: int
    round_length: int
    ends_round: bool
    due: bool


def schedule(rounds: Rounds, ticks: int) -> Iterator[int]:
    """H of every round of a run of so many ticks, or an error where they do not fit."""
    inner = rounds.inner.ticks
    if ticks < 1 or ticks % inner:
        fits = max(inner, ticks - ticks % inner)
        raise ConfigurationError(
            f"{ticks} ticks do not divide into the {inner} ticks between hub averages; {fits} or "
            f"{fits + inner} would"
            if ticks > 0
            else f"a run must take at least 1 tick, got {ticks}"
        )
    return _in_whole_stages(periods.lengths(rounds.period, ticks), inner)


def _in_whole_stages(lengths: Iterator[int], inner: int) -> Iterator[int]:
    for length in lengths:
        if length % inner:
            raise ConfigurationError(
                f"a round of {length} ticks is no multiple of the {inner} ticks of its inner stage"
            )
        yield length


def dispatches(round_fn: RoundFn, ticks: int, measure_every: int = 0) -> Iterator[Dispatch]:
    """The pieces in which a run goes to the device: rounds, cut where measurements are due, in
    chunks."""
    inner, tick = round_fn.rounds.inner.ticks, 0
    if measure_every < 0:
        raise ConfigurationError(f"ticks between measurements must be ≥ 0, got {measure_every}")

    def due(tick: int, end: int) -> bool:
        return tick == ticks or (tick % measure_every < inner if measure_every else tick == end)

    for length in schedule(round_fn.rounds, ticks):
        end = tick + length
        while tick < end:
            stop = next(t for t in range(tick + inner, end + 1, inner) if t == end or due(t, end))
            for size in round_fn.chunks(stop - tick):
                tick += size
                yield Dispatch(tick - size, size, length, tick == end, due(tick, end))


def run(
    round_fn: RoundFn,
    state: TrainState,
    batches: Callable[[int, int], Tree],
    ticks: int,
    measure_every: int = 0,
) -> Iterator[Step]:
    """Train for some ticks; yields before the first and after every dispatch. Stop by no longer
    asking.

    Args:
      batches: `batches(start_tick, ticks)` → leaves [ticks, hubs, workers, ...]; called while the
        device is busy.
      ticks: of the whole run, which ends on a synchronisation.
      measure_every: ticks between measurements. A step is due at tick 0, at every multiple (on
        hubs: at the first hub average from there on) and at the end; with 0, at the end of every
          round.

    Raises:
      Diverged: a worker's loss is NaN or infinite; known at most two dispatches later, and before
        any measurement.
    """
    inner, outer = round_fn.traffic(state)
    said, rounds, losses = Messages(), 0, _Losses(round_fn)
    first = next(schedule(round_fn.rounds, ticks))
    yield Step(state, 0, 0, first, said, math.nan, True, 0.0)
    for start, size, length, ends_round, due in dispatches(round_fn, ticks, measure_every):
        state, info = round_fn.local_steps(state, batches(start, size))
        losses.add(start, info)
        said = said.plus(inner, size // round_fn.rounds.inner.ticks)
        distance = float(round_fn.consensus_distance(state)) if due else 0.0
        if ends_round:
            state, _ = round_fn.end_round(state)
            said, rounds = said.plus(outer), rounds + 1
        losses.check(0 if due else _AHEAD)
        yield Step(state, start + size, rounds, length, said, losses.mean, due, distance)


class _Losses:
    """The losses that dispatches report, looked at a little later so that the device never waits
    for the host."""

    def __init__(self, round_fn: RoundFn):
        self.mean = math.nan
        self._weight = round_fn.layout.weight
        self._waiting: deque[tuple[int, Info]] = deque()

    def add(self, start: int, info: Info) -> None:
        if "loss" in info.worker:
            self._waiting.append((start, info))

    def check(self, ahead: int) -> None:
        """Look at all but the newest few."""
        while len(self._waiting) > ahead:
            start, info = self._waiting.popleft()
            losses, active = (
                np.asarray(info.worker["loss"], np.float64),
                np.asarray(info.worker["active"]),
            )
            wrong = np.argwhere(~np.isfinite(losses))
            if len(wrong):
                tick, hub, worker = wrong[0]
                raise Diverged(
                    start + int(tick),
                    int(hub * losses.shape[2] + worker),
                    float(losses[tuple(wrong[0])]),
                )
            weight = active * self._weight
            if weight.sum() > 0:
                self.mean = float((losses * weight).sum() / weight.sum())


class Evaluation:
    """Means of per-example metrics of the average model u = Σ a_i x_i; `evaluation(state)` → dict
    of floats.

    Every device takes its part of the examples.

    Args:
      round_fn: whose states are evaluated.
      metrics: `metrics(params, model_state, batch)` → dict of [batch].
      data: a pool of examples, a tree of arrays [examples, ...]; by default the pool of the rounds.
      examples: which of them, int [n]; by default all.
      batch_size: examples that a device takes at once.
    """

    def __init__(
        self,
        round_fn: RoundFn,
        metrics: Callable[[Tree, Tree, Tree], dict[str, jax.Array]],
        data: Tree = None,
        examples: np.ndarray | None = None,
        batch_size: int = 500,
    ):
        mesh = round_fn.mesh
        self._data = (
            round_fn.world.data if data is None else jax.device_put(data, NamedSharding(mesh, P()))
        )
        leaves = jax.tree.leaves(self._data)
        if examples is None:
            examples = np.arange(len(leaves[0]) if leaves else 0)
        if not len(examples):
            raise ConfigurationError("an evaluation needs at least 1 example, got 0")
        self._round_fn = round_fn
        per_device = -(-len(examples) // mesh.size)
        size = min(batch_size, per_device)
        shape = (mesh.size, -(-per_device // size), size)
        places = np.arange(math.prod(shape))
        index = np.asarray(examples, np.int32)[places % len(examples)].reshape(shape)
        counts = (places < len(examples)).reshape(shape)
        self._index, self._counts = jax.device_put((index, counts), NamedSharding(mesh, P(AXES)))
        specs = (STACKED, WORLD, P(), P(AXES), P(AXES))
        mapped = workers.over_mesh(_mean_metrics(metrics), mesh, specs, P())
        self._program = jax.jit(mapped)

    def __call__(self, state: TrainState) -> dict[str, float]:
        model = (state.params, state.model_state)
        means = self._program(model, self._round_fn.world, self._data, self._index, self._counts)
        return {name: float(value) for name, value in jax.device_get(means).items()}


def _mean_metrics(metrics):
    def program(model, world, data, index, counts):
        params, model_state = workers.mean(model, world)

        def one_batch(carry, batch):
            rows, mask = batch
            values = metrics(params, model_state, jax.tree.map(lambda pool: pool[rows], data))
            return carry, {name: _sum(jnp.where(mask, value, 0)) for name, value in values.items()}

        _, sums = lax.scan(one_batch, (), (index[0], counts[0]))
        total = lax.psum(counts.sum(), AXES)
        return {name: lax.psum(value.sum(), AXES) / total for name, value in sums.items()}

    return program


def _sum(values: jax.Array) -> jax.Array:
    return values.sum(dtype=jnp.promote_types(values.dtype, jnp.float32))
