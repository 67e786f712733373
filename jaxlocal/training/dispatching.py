"""When the steps of a run are dispatched: the lengths of its rounds, and the pieces of a round."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxlocal import periods
from jaxlocal.errors import ConfigurationError
from jaxlocal.periods.fixed import at_least_one
from jaxlocal.training.checks import MOST_STEPS, check_interval, check_length
from jaxlocal.training.round import RoundFn
from jaxlocal.types import Method


class Dispatch(NamedTuple):
    """Steps of one round that the host sends to the devices in one call."""

    start: int  # the first step
    steps: int  # number of steps
    round_length: int  # H of the round
    ends_round: bool  # whether the round ends after these steps
    due: bool  # whether a measurement is due after these steps


def schedule(method: Method, steps: int) -> Iterator[int]:
    """Lengths H of all rounds of a run, in steps.

    They follow the method's period. If the steps that remain at last are too few for a round, they
    join the round before.

    Args:
      method: the method.
      steps: number of steps of the run.

    Returns:
      An iterator over H of each round; their sum is `steps`.

    Raises:
      ConfigurationError: the steps are no integer from 1 to 2³¹ − 1, do not divide into inner
        stages, or a round is too short.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda params, batch, key: (params - batch) ** 2)
    >>> list(schedule(jaxlocal.local_sgd(grad_fn, optax.sgd(0.1), period=4), 10))
    [4, 4, 2]
    """
    if not isinstance(method, Method):
        raise ConfigurationError(
            f"a schedule is of a method, such as round_fn.method, got {type(method).__name__}"
        )
    at_least_one("the length of a run", steps)
    if steps > MOST_STEPS:
        raise ConfigurationError(
            f"a run takes at most {MOST_STEPS} steps, to which an int32 counts, got {steps}"
        )
    if steps % (inner := method.inner.steps):
        nearest = max(inner, steps - steps % inner)
        raise ConfigurationError(
            f"{steps} steps do not divide into the {inner} steps between hub averages; {nearest} "
            f"or {nearest + inner} would"
        )
    return _round_lengths(method, steps)


def _round_lengths(method: Method, remaining: int) -> Iterator[int]:
    for length in periods.lengths(method.period, remaining):
        if remaining - length <= method.outer.steps:
            length = remaining
        if length % method.inner.steps:
            raise ConfigurationError(
                f"a round of {length} steps is not a multiple of the {method.inner.steps} steps of "
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
    """Dispatches of a run: its rounds, cut where measurements are due, in the chunks of
    `RoundFn.chunks`.

    Args:
      round_fn: the round function.
      steps: number of steps of the whole run.
      measure_every: steps between measurements, as for `run`.
      start: the step from which the run is resumed; it may lie within a round.

    Returns:
      An iterator over the dispatches from `start` on.

    Raises:
      ConfigurationError: the run cannot be resumed at `start`, the steps do not divide, or
        `measure_every` is not an integer ≥ 0.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda params, batch, key: (params - batch) ** 2)
    >>> method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.1), period=5)
    >>> round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
    >>> [(piece.start, piece.steps, piece.ends_round) for piece in dispatches(round_fn, 8)]
    [(0, 5, True), (5, 1, False), (6, 1, False), (7, 1, True)]
    """
    inner = round_fn.method.inner.steps
    check_interval("measurements", measure_every)
    lengths = schedule(round_fn.method, steps)
    if not 0 <= start <= steps or start % inner:
        raise ConfigurationError(
            f"a run of {steps} steps, with {inner} between hub averages, cannot be resumed at step "
            f"{start}"
        )

    def is_due(step: int, end: int) -> bool:
        return step == steps or (step % measure_every < inner if measure_every else step == end)

    end = 0
    for length in lengths:
        begin, end = end, end + length
        if start < end:
            yield from _dispatches_of_round(round_fn, length, max(begin, start), end, is_due)


def _dispatches_of_round(
    round_fn: RoundFn, length: int, step: int, end: int, is_due: Callable[[int, int], bool]
) -> Iterator[Dispatch]:
    """The dispatches from a step of a round to its end."""
    inner, outer_steps = round_fn.method.inner.steps, round_fn.method.outer.steps
    local_end = end - outer_steps
    if local_end < step:
        raise ConfigurationError(
            f"a run cannot be resumed at step {step}, while the round from step {local_end} to "
            f"{end} ends"
        )
    while step < local_end:
        stops = range(step + inner, local_end + 1, inner)
        stop = next(t for t in stops if t == local_end or is_due(t, end))
        for size in round_fn.chunks(stop - step):
            step += size
            yield Dispatch(step - size, size, length, step == end, is_due(step, end))
    if outer_steps:
        due = any(is_due(t, end) for t in range(local_end + inner, end + 1, inner))
        yield Dispatch(local_end, outer_steps, length, True, due)
