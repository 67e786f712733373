"""The host loop of a run: it dispatches steps, reads losses and counts the bits that are sent."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.mesh import jit_on
from jaxlocal.training.checks import check_interval, leading_size
from jaxlocal.training.dispatching import dispatches, schedule
from jaxlocal.training.round import RoundFn
from jaxlocal.types import Info, MessageBits, TrainState, Tree

# Number of dispatches that may run before the host reads the losses of the oldest of them.
_AHEAD = 2


class Diverged(ArithmeticError):
    """The loss of a worker, or a model, is NaN or infinite.

    Args:
      step: the step of the loss, or the step after which a model is not finite.
      worker: the worker's number; None for a model.
      loss: the worker's loss; None for a model.
    """

    def __init__(self, step: int, worker: int | None = None, loss: float | None = None) -> None:
        what = (
            "a model is not finite" if worker is None else f"the loss of worker {worker} is {loss}"
        )
        super().__init__(f"{what} at step {step}")
        self.step, self.worker, self.loss = step, worker, loss


class Progress(NamedTuple):
    """The state of a run before its first step, or after a dispatch; `run` yields it.

    The next dispatch donates `state`: use it, or copy it, before you ask for the next progress.
    """

    state: TrainState
    step: int  # steps taken
    round: int  # rounds that have ended
    round_length: int  # H of the round that runs or that just ended; of the first round at step 0
    message_bits: MessageBits  # bits sent so far
    loss: float  # newest loss known, the mean over its dispatch's workers and steps; NaN before
    due: bool  # whether a measurement is due
    save: bool  # whether a checkpoint is due; the losses and models so far are then finite
    distance: float  # consensus distance if a measurement is due, before a synchronisation; else 0


def run(
    round_fn: RoundFn,
    state: TrainState,
    batches: Callable[[int, int], Tree],
    steps: int,
    measure_every: int = 0,
    save_every: int = 0,
) -> Iterator[Progress]:
    """Train for a number of steps, and yield the progress after each dispatch.

        for progress in run(round_fn, state, batches, steps=200):
            ...

    It yields before step 0 and after every dispatch of steps to the devices. To stop a run, leave
    the loop. To resume it, call `run` with the same arguments and a saved state: the run continues
    from the state's step, with the same bits as a run that was not stopped.

    Args:
      round_fn: the round function.
      state: the state to start from, as `round_fn.init` or `Checkpoints.restore` gives it; it is
        donated.
      batches: `batches(start_step, steps)` gives the batches of some steps, leaves [steps, hubs,
        workers_per_hub, ...]. It is called while the devices compute, and must depend on its
        arguments only.
      steps: number of steps of the whole run, the same when it is resumed. The run ends with a
        synchronisation.
      measure_every: steps between measurements; 0 for one at the end of every round. A measurement
        is due at step 0, at every multiple of `measure_every`, and at the end. With hubs, it is due
        at the first hub average from the multiple on; for the steps of an outer stage, at the end
        of the round.
      save_every: steps between checkpoints; 0 for none. A checkpoint is due after the first
        dispatch that reaches or passes a multiple of `save_every`, and at the end. Dispatches are
        not cut for it.

    Returns:
      An iterator over the progress.

    Raises:
      Diverged: the loss of a worker or a model is NaN or infinite. It is raised at most two
        dispatches later, and before any measurement or checkpoint is due. On a mesh of several
        processes, it is raised in all of them when the next measurement or checkpoint is due.
      ConfigurationError: see `schedule` and `dispatches`; `save_every` is not an integer ≥ 0, the
        state does not belong to the round function, or `batches` gives other steps than asked for.

    >>> import jax, jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda params, batch, key: (params - batch) ** 2)
    >>> method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.25), period=4)
    >>> round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
    >>> state = round_fn.init(np.float32(0), jax.random.key(0))
    >>> ones = lambda start_step, steps: np.ones((steps, 1, 2), np.float32)
    >>> for progress in run(round_fn, state, ones, steps=8):
    ...     print(progress.step, progress.message_bits.workers, progress.state.params[0, 0])
    0 0 0.0
    4 32 0.9375
    8 64 0.99609375
    """
    check_interval("checkpoints", save_every)
    if not callable(batches):
        raise ConfigurationError(
            f"batches must be a function of the start step and the steps, got "
            f"{type(batches).__name__}"
        )
    round_fn.check(state)
    begin, ending = int(state.step), round_fn.method.outer.steps
    losses, sent = _Losses(round_fn), _Sent(round_fn, state, steps)
    if begin == 0:
        first = next(schedule(round_fn.method, steps))
        yield Progress(state, 0, 0, first, sent.bits, math.nan, True, False, 0.0)
    for start, size, length, ends_round, due in dispatches(round_fn, steps, measure_every, begin):
        fed = _fed(round_fn, batches, start, size)
        distance: Any = 0.0
        if size == length and ends_round and round_fn.is_measured(state, size):
            state, info, distance = round_fn.measured_round(state, fed)
            losses.add(start, info)
        else:
            if not (ends_round and ending):
                state, info = round_fn.local_steps(state, fed)
                losses.add(start, info)
            if due:
                distance = float(round_fn.consensus_distance(state))
            if ends_round:
                state, info = round_fn.end_round(state, fed if ending else ())
                losses.add(start, info)
        sent.add(0 if ends_round and ending else size, ends_round)
        distance = np.asarray(distance).item() if due else 0.0
        now = start + size
        save = bool(save_every) and (now == steps or now // save_every > start // save_every)
        losses.check(0 if due or save else _AHEAD)
        if save and not math.isfinite(float(round_fn.consensus_distance(state))):
            raise Diverged(now)
        yield Progress(state, now, sent.rounds, length, sent.bits, losses.mean, due, save, distance)


def _fed(round_fn: RoundFn, batches: Callable[[int, int], Tree], start: int, steps: int) -> Tree:
    """The batches of some steps, exactly as many as were asked for."""
    fed = batches(start, steps)
    if (got := leading_size(fed, round_fn.layout)) != steps:
        raise ConfigurationError(
            f"batches({start}, {steps}) must give the batches of {steps} steps from step {start} "
            f"on, and gave {got}"
        )
    return fed


class _Sent:
    """The rounds that have ended and the bits that have been sent, from the state's step on."""

    def __init__(self, round_fn: RoundFn, state: TrainState, steps: int) -> None:
        method, begin = round_fn.method, int(state.step)
        self._inner_steps = method.inner.steps
        self._inner = round_fn.stage_bits(state)[0]
        self._outer = [round_fn.stage_bits(state, n)[1] for n in range(method.outer.turns)]
        ends = itertools.accumulate(schedule(method, steps))
        self.rounds = sum(1 for _ in itertools.takewhile(lambda end: end <= begin, ends))
        self.bits = round_fn.message_bits(state, begin, self.rounds)

    def add(self, steps: int, ends_round: bool) -> None:
        """Add inner stages of some steps, and maybe the end of a round."""
        self.bits = self.bits.plus(self._inner, steps // self._inner_steps)
        if ends_round:
            self.bits = self.bits.plus(self._outer[self.rounds % len(self._outer)])
            self.rounds += 1


class _Losses:
    """The losses of the dispatches, which the host reads a little later than they are dispatched.

    So the devices never wait for the host.
    """

    def __init__(self, round_fn: RoundFn) -> None:
        self.mean = math.nan
        self._weight = round_fn.layout.weight
        self._several_processes = round_fn.mesh.is_multi_process
        everywhere = NamedSharding(round_fn.mesh, P())
        self._replicated = jit_on(round_fn.mesh, lambda losses: losses, out_shardings=everywhere)
        self._waiting: deque[tuple[int, Info]] = deque()

    def add(self, start: int, info: Info) -> None:
        if "loss" in info.worker:
            self._waiting.append((start, info))

    def check(self, ahead: int) -> None:
        """Read all losses except those of the newest `ahead` dispatches.

        Several processes have to exchange their losses, and read none while `ahead` is positive.
        """
        if self._several_processes and ahead:
            return
        while len(self._waiting) > ahead:
            self._read(*self._waiting.popleft())

    def _read(self, start: int, info: Info) -> None:
        arrays = (info.worker["loss"], info.worker["active"])
        if self._several_processes:
            arrays = self._replicated(arrays)
        losses, active = map(np.asarray, arrays)
        losses = losses.astype(np.float64)
        if not np.isfinite(losses).all():
            step, hub, worker = map(int, np.argwhere(~np.isfinite(losses))[0])
            number = hub * losses.shape[2] + worker
            raise Diverged(start + step, number, float(losses[step, hub, worker]))
        weight = active * self._weight
        if weight.sum() > 0:
            self.mean = float((losses * weight).sum() / weight.sum())
