"""The host's side of a run: which steps are dispatched when, and what was said by then."""

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
from jaxlocal.training.round import RoundFn, check_length
from jaxlocal.types import Info, MessageBits, Method, TrainState, Tree

# Dispatches that may be under way before the host looks at what the oldest of them reported.
_AHEAD = 2


class Diverged(ArithmeticError):
    """A worker's loss is NaN or infinite, or (worker and loss are None) a model is."""

    def __init__(self, step: int, worker: int | None = None, loss: float | None = None):
        what = (
            "a model is not finite" if worker is None else f"the loss of worker {worker} is {loss}"
        )
        super().__init__(f"{what} at step {step}")
        self.step, self.worker, self.loss = step, worker, loss


class Progress(NamedTuple):
    """Where a run stands after a dispatch. The state is donated to the next one: use it before."""

    state: TrainState
    step: int
    round: int  # rounds that have ended
    local_steps: int  # H of the round under way or just ended; of the first round at step 0
    message_bits: MessageBits  # said so far
    loss: float  # mean over workers and steps of the newest losses that have come back; NaN before
    due: bool  # whether a measurement is due
    save: bool  # whether a checkpoint is due; losses and models are finite then
    distance: float  # if so, the consensus distance; before the synchronisation, if one took place


class Dispatch(NamedTuple):
    """A piece of a round that goes to the device at once."""

    start: int
    steps: int
    round_length: int
    ends_round: bool
    due: bool


def schedule(method: Method, steps: int) -> Iterator[int]:
    """H of every round of a run of so many steps, or an error where they do not fit."""
    inner = method.inner.steps
    if steps < 1 or steps % inner:
        fits = max(inner, steps - steps % inner)
        raise ConfigurationError(
            f"{steps} steps do not divide into the {inner} steps between hub averages; {fits} or "
            f"{fits + inner} would"
            if steps > 0
            else f"a run must take at least 1 step, got {steps}"
        )
    return _in_whole_stages(method, steps)


def _in_whole_stages(method: Method, remaining: int) -> Iterator[int]:
    """The lengths; what remains at last joins the round before where it is too short for one."""
    for length in periods.lengths(method.period, remaining):
        if remaining - length <= method.outer.steps:
            length = remaining
        if length % method.inner.steps:
            raise ConfigurationError(
                f"a round of {length} steps is no multiple of the {method.inner.steps} steps of "
                f"its inner stage"
            )
        check_length(method, length)
        yield length
        remaining -= length
        if not remaining:
            return


def dispatches(
    round_fn: RoundFn, steps: int, measure_every: int = 0, start: int = 0
) -> Iterator[Dispatch]:
    """The pieces in which a run goes to the device: rounds, cut where measurements are due, in
    chunks; from a step on, where a piece may begin in the middle of a round."""
    method, step = round_fn.method, 0
    inner, ending = method.inner.steps, method.outer.steps
    if measure_every < 0:
        raise ConfigurationError(f"steps between measurements must be ≥ 0, got {measure_every}")

    def due(step: int, end: int) -> bool:
        return step == steps or (step % measure_every < inner if measure_every else step == end)

    if not 0 <= start <= steps or start % inner:
        raise ConfigurationError(
            f"a run of {steps} steps, {inner} between hub averages, cannot go on from step {start}"
        )
    for length in schedule(method, steps):
        end = step + length
        local = end - ending  # from where on steps belong to what ends the round
        step = min(max(step, start), end)
        if local < step < end:
            raise ConfigurationError(
                f"a run cannot go on from step {step}, while the round from step {local} to {end} "
                f"ends"
            )
        while step < local:
            stops = range(step + inner, local + 1, inner)
            stop = next(t for t in stops if t == local or due(t, end))
            for size in round_fn.chunks(stop - step):
                step += size
                yield Dispatch(step - size, size, length, step == end, due(step, end))
        if step < end:
            measured = any(due(t, end) for t in range(step + inner, end + 1, inner))
            step = end
            yield Dispatch(local, ending, length, True, measured)


def run(
    round_fn: RoundFn,
    state: TrainState,
    batches: Callable[[int, int], Tree],
    steps: int,
    measure_every: int = 0,
    save_every: int = 0,
) -> Iterator[Progress]:
    """Train from the state's step to that of the end; yields before step 0 and after every
    dispatch. Stop by no longer asking.

    The state of a step, saved and given again, goes on as if it had never stopped: where a run
    stands follows from its step.

    Args:
      batches: `batches(start_step, steps)` → leaves [steps, hubs, workers, ...]; called while the
        device is busy.
      steps: of the whole run, which ends on a synchronisation; the same where it goes on.
      measure_every: steps between measurements. A step is due at step 0, at every multiple (on
        hubs: at the first hub average from there on; in steps that end a round: at its end) and
        at the end; with 0, at the end of every round.
      save_every: steps between checkpoints. One is due at the first dispatch from every multiple
        on and at the end; with 0, never. It cuts no round.

    Raises:
      Diverged: a worker's loss is NaN or infinite; known at most two dispatches later, and before
        any measurement and any checkpoint. On a mesh of several processes, which tell each other
        their losses then only, known in all of them at the next measurement or checkpoint.
    """
    turns = range(round_fn.method.outer.turns)
    inner, outer = round_fn.stage_bits(state)[0], [round_fn.stage_bits(state, n)[1] for n in turns]
    if save_every < 0:
        raise ConfigurationError(f"steps between checkpoints must be ≥ 0, got {save_every}")
    begin, losses, ending = int(state.step), _Losses(round_fn), round_fn.method.outer.steps
    pieces = dispatches(round_fn, steps, measure_every, begin)
    ends = itertools.accumulate(schedule(round_fn.method, steps))
    rounds = sum(1 for _ in itertools.takewhile(lambda end: end <= begin, ends))
    said = round_fn.message_bits(state, begin, rounds)
    if begin == 0:
        first = next(schedule(round_fn.method, steps))
        yield Progress(state, 0, 0, first, said, math.nan, True, False, 0.0)
    for start, size, length, ends_round, due in pieces:
        fed = batches(start, size)
        if not (ends_round and ending):
            state, info = round_fn.local_steps(state, fed)
            losses.add(start, info)
            said = said.plus(inner, size // round_fn.method.inner.steps)
        distance = float(round_fn.consensus_distance(state)) if due else 0.0
        if ends_round:
            state, info = round_fn.end_round(state, fed if ending else ())
            losses.add(start, info)
            said, rounds = said.plus(outer[rounds % len(outer)]), rounds + 1
        now = start + size
        save = bool(save_every) and (now == steps or now // save_every > start // save_every)
        losses.check(0 if due or save else _AHEAD)
        if save and not math.isfinite(float(round_fn.consensus_distance(state))):
            raise Diverged(now)
        yield Progress(state, now, rounds, length, said, losses.mean, due, save, distance)


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
                step, hub, worker = wrong[0]
                raise Diverged(
                    start + int(step),
                    int(hub * losses.shape[2] + worker),
                    float(losses[tuple(wrong[0])]),
                )
            weight = active * self._weight
            if weight.sum() > 0:
                self.mean = float((losses * weight).sum() / weight.sum())
