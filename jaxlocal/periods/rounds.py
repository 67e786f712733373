"""The rounds that a period makes of a run."""

import numbers
import operator
from collections.abc import Iterator

import numpy as np
import optax

from jaxlocal.errors import ConfigurationError
from jaxlocal.periods.fixed import constant
from jaxlocal.periods.schedules import rates
from jaxlocal.types import Period

# Steps at which two schedules must agree: the first thousands, and more and more rarely after them.
_COMPARED = (*range(4096), *(round(4096 * 1.05**n) for n in range(120)))


def of(period: Period | int, optimizer: optax.GradientTransformation | None = None) -> Period:
    """Make the period of a method: a rule stays as it is, a number of steps is the constant rule.

    Args:
      period: a rule, or H.
      optimizer: of the workers.

    Raises:
      ConfigurationError: the rule reads another learning rate than the optimizer follows, where the
        optimizer knows it (see `jaxlocal.scheduled`).

    >>> of(4).description
    'constant, H = 4'
    """
    rule = period if isinstance(period, Period) else constant(period)
    if rule.learning_rate is not None:
        check_schedule("the period reads", rule.learning_rate, optimizer)
    return rule


def check_schedule(
    what: str,
    learning_rate: optax.ScalarOrSchedule,
    optimizer: optax.GradientTransformation | None,
) -> None:
    """Raise ConfigurationError where a schedule is not the one that the optimizer follows.

    Args:
      what: whose schedule it is, for the sentence, such as "the period reads".
      learning_rate: the schedule.
      optimizer: of the workers, whose own schedule is known where `scheduled` made it.
    """
    follows = getattr(optimizer, "learning_rate", None)
    if follows is None or learning_rate is follows:
        return
    ours, theirs = rates(learning_rate), rates(follows)
    for step in _COMPARED:
        if not np.isclose(ours(step), theirs(step), rtol=1e-6, atol=0):
            raise ConfigurationError(
                f"{what} the learning rate {ours(step):g} at step {step}, and the optimizer "
                f"follows {theirs(step):g} there; give both the same schedule"
            )


def split(period: Period | int, parts: int) -> Period:
    """Divide the rounds of a rule into equal parts, of H / parts steps each.

    Args:
      period: a rule, or H.
      parts: into how many rounds one round of the rule is divided; it must divide every H.

    >>> list(lengths(split(8, 4), total_steps=11))
    [2, 2, 2, 2, 2, 1]
    """
    if not isinstance(parts, numbers.Integral) or parts < 1:
        raise ConfigurationError(
            f"the rounds of a period must be an integer of at least 1, got {parts}"
        )
    whole = of(period)
    if parts == 1:
        return whole

    def length(step: int, remaining: int) -> int:
        steps = length_at(whole, step, parts * remaining)
        if steps % parts:
            raise ConfigurationError(
                f"a period of {steps} steps does not divide into {parts} rounds"
            )
        return steps // parts

    description = f"{whole.description}, in {parts} rounds"
    return whole._replace(length=length, description=description)


def length_at(period: Period, step: int, remaining: int) -> int:
    """H of the round that a rule begins at a step: an int, at most the steps that remain.

    Raises:
      ConfigurationError: the rule gives something else than an integer of at least 1.

    >>> length_at(Period(lambda step, remaining: 4, "a rule"), step=8, remaining=3)
    3
    """
    given = period.length(step, remaining)
    try:
        steps = 0 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        steps = 0
    if steps < 1:
        raise ConfigurationError(
            f"the period of the method ({period.description}) must give an integer of at least 1 "
            f"step, got {given!r} at step {step}"
        )
    return min(steps, remaining)


def lengths(period: Period, total_steps: int) -> Iterator[int]:
    """List H of every round of a run, one after another; they sum to the total.

    Args:
      period: the rule.
      total_steps: the steps of the run.

    >>> list(lengths(constant(3), total_steps=7))
    [3, 3, 1]
    """
    step = 0
    while step < total_steps:
        yield (steps := length_at(period, step, total_steps - step))
        step += steps
