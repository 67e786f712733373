"""The host's side of a run: which ticks are dispatched when, and what was said by then."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlocal import periods
from jaxlocal.errors import ConfigurationError
from jaxlocal.rounds import RoundFn
from jaxlocal.types import Info, Messages, Rounds, TrainState, Tree

# Dispatches that may be under way before the host looks at what the oldest of them reported.
_AHEAD = 2


class Diverged(ArithmeticError):
    """A worker's loss is NaN or infinite, or (worker and loss are None) a model is."""

    def __init__(self, tick: int, worker: int | None = None, loss: float | None = None):
        what = (
            "a model is not finite" if worker is None else f"the loss of worker {worker} is {loss}"
        )
        super().__init__(f"{what} at tick {tick}")
        self.tick, self.worker, self.loss = tick, worker, loss


class Step(NamedTuple):
    """Where a run stands after a dispatch. The state is donated to the next one: use it before."""

    state: TrainState
    tick: int
    round: int  # rounds that have ended
    local_steps: int  # H of the round under way or just ended; of the first round at tick 0
    messages: Messages  # said so far
    loss: float  # mean over workers and ticks of the newest losses that have come back; NaN before
    due: bool  # whether a measurement is due
    save: bool  # whether a checkpoint is due; losses and models are finite then
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


def dispatches(
    round_fn: RoundFn, ticks: int, measure_every: int = 0, start: int = 0
) -> Iterator[Dispatch]:
    """The pieces in which a run goes to the device: rounds, cut where measurements are due, in
    chunks; from a tick on, where a piece may begin in the middle of a round."""
    inner, tick = round_fn.rounds.inner.ticks, 0
    if measure_every < 0:
        raise ConfigurationError(f"ticks between measurements must be ≥ 0, got {measure_every}")

    def due(tick: int, end: int) -> bool:
        return tick == ticks or (tick % measure_every < inner if measure_every else tick == end)

    if not 0 <= start <= ticks or start % inner:
        raise ConfigurationError(
            f"a run of {ticks} ticks, {inner} between hub averages, cannot go on from tick {start}"
        )
    for length in schedule(round_fn.rounds, ticks):
        end = tick + length
        tick = min(max(tick, start), end)
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
    save_every: int = 0,
) -> Iterator[Step]:
    """Train from the state's tick to that of the end; yields before tick 0 and after every
    dispatch. Stop by no longer asking.

    The state of a step, saved and given again, goes on as if it had never stopped: where a run
    stands follows from its tick.

    Args:
      batches: `batches(start_tick, ticks)` → leaves [ticks, hubs, workers, ...]; called while the
        device is busy.
      ticks: of the whole run, which ends on a synchronisation; the same where it goes on.
      measure_every: ticks between measurements. A step is due at tick 0, at every multiple (on
        hubs: at the first hub average from there on) and at the end; with 0, at the end of every
        round.
      save_every: ticks between checkpoints. One is due at the first dispatch from every multiple
        on and at the end; with 0, never. It cuts no round.

    Raises:
      Diverged: a worker's loss is NaN or infinite; known at most two dispatches later, and before
        any measurement and any checkpoint. On a mesh of several processes, which tell each other
        their losses then only, known in all of them at the next measurement or checkpoint.
    """
    turns = range(round_fn.rounds.outer.turns)
    inner, outer = round_fn.traffic(state)[0], [round_fn.traffic(state, n)[1] for n in turns]
    if save_every < 0:
        raise ConfigurationError(f"ticks between checkpoints must be ≥ 0, got {save_every}")
    begin, losses = int(state.tick), _Losses(round_fn)
    pieces = dispatches(round_fn, ticks, measure_every, begin)
    ends = itertools.accumulate(schedule(round_fn.rounds, ticks))
    rounds = sum(1 for _ in itertools.takewhile(lambda end: end <= begin, ends))
    said = round_fn.messages(state, begin, rounds)
    if begin == 0:
        first = next(schedule(round_fn.rounds, ticks))
        yield Step(state, 0, 0, first, said, math.nan, True, False, 0.0)
    for start, size, length, ends_round, due in pieces:
        state, info = round_fn.local_steps(state, batches(start, size))
        losses.add(start, info)
        said = said.plus(inner, size // round_fn.rounds.inner.ticks)
        distance = float(round_fn.consensus_distance(state)) if due else 0.0
        if ends_round:
            state, _ = round_fn.end_round(state)
            said, rounds = said.plus(outer[rounds % len(outer)]), rounds + 1
        now = start + size
        save = bool(save_every) and (now == ticks or now // save_every > start // save_every)
        losses.check(0 if due or save else _AHEAD)
        if save and not math.isfinite(float(round_fn.consensus_distance(state))):
            raise Diverged(now)
        yield Step(state, now, rounds, length, said, losses.mean, due, save, distance)


class _Losses:
    """The losses that dispatches report, looked at a little later so that the device never waits
    for the host."""

    def __init__(self, round_fn: RoundFn):
        self.mean = math.nan
        self._weight = round_fn.layout.weight
        self._spread_out = round_fn.mesh.is_multi_process
        everywhere = NamedSharding(round_fn.mesh, P())
        self._told = jax.jit(lambda losses: losses, out_shardings=everywhere)
        self._waiting: deque[tuple[int, Info]] = deque()

    def add(self, start: int, info: Info) -> None:
        if "loss" in info.worker:
            self._waiting.append((start, info))

    def check(self, ahead: int) -> None:
        """Look at all but the newest few; at none yet where processes would have to tell each
        other and not all are wanted."""
        if self._spread_out and ahead:
            return
        while len(self._waiting) > ahead:
            start, info = self._waiting.popleft()
            said = (info.worker["loss"], info.worker["active"])
            losses, active = map(np.asarray, self._told(said) if self._spread_out else said)
            losses = losses.astype(np.float64)
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
