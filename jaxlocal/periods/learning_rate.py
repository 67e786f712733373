"""Periods that follow the learning rate: the quadratic, linear and cubic synchronization rules."""

import numbers

import numpy as np
import optax

from jaxlocal.errors import ConfigurationError
from jaxlocal.periods.fixed import at_least_one
from jaxlocal.periods.schedules import is_real, rates
from jaxlocal.types import Period

_HIGHEST = 16  # the exponent up to which the power of any number of steps is finite


def qsr(
    learning_rate: optax.ScalarOrSchedule,
    *,
    coefficient: float,
    base: int,
    warmup_steps: int = 0,
    warmup_period: int | None = None,
    multiple: int = 1,
) -> Period:
    """Quadratic Synchronization Rule (QSR): synchronise less often as the learning rate falls.

        H^(s) = max(H_base, ⌊(α / η_t)²⌋)

    s numbers the rounds, t is the first step of round s and η_t the learning rate there. H changes
    only right after an average; the last round is clipped to the steps that remain.

    While the rate rises, in a warm-up and after a restart, the rule takes the peak to which it
    rises. A round ends before the steps whose rate has risen so far that they ask for a shorter
    one, as at the next restart.

    Args:
      learning_rate: η by step, as optax has schedules, or a number. Give the schedule once, to the
        optimizer, and read it from there, as in the example.
      coefficient: α ≥ 0, in units of η; at 0 the period is H_base throughout. The paper has 0.0175
        for AdamW on ViT-B with the peak rate 0.008, and 0.2 for SGD on ResNet-152 with 0.8.
      base: H_base, steps; 4 or 8 in the paper.
      warmup_steps: the length of a warm-up in which the rule takes the rate right after it. Needed
        only where that is not the peak; a rise is seen in the schedule.
      warmup_period: H of the rounds that start within `warmup_steps`, instead of what the rule
        gives; any number of steps, as `init_h` in the released code.
      multiple: H is rounded down to a multiple of it, which must divide H_base and `warmup_period`:
        τ on hubs, the number of fragments in streaming DiLoCo.

    Raises:
      ConfigurationError: a coefficient below 0, an H_base that is not a multiple of `multiple`, a
        `warmup_period` without a warm-up; when the length of a round is asked for, a learning rate
        below 0.

    >>> import jaxlocal, optax
    >>> schedule = optax.cosine_decay_schedule(0.1, 200)
    >>> optimizer = jaxlocal.scheduled(optax.sgd, schedule, momentum=0.9)
    >>> rule = qsr(optimizer.learning_rate, coefficient=0.2, base=4)
    >>> from jaxlocal.periods import lengths
    >>> list(lengths(rule, total_steps=200))[-5:]
    [10, 14, 22, 59, 9]

    Source: Gu, Lyu, Arora, Zhang, Huang, "A Quadratic Synchronization Rule for Distributed Deep
    Learning", ICLR 2024, https://arxiv.org/abs/2310.14423.
    """
    return power(
        learning_rate,
        coefficient=coefficient,
        base=base,
        exponent=2,
        warmup_steps=warmup_steps,
        warmup_period=warmup_period,
        multiple=multiple,
    )


def linear(
    learning_rate: optax.ScalarOrSchedule,
    *,
    coefficient: float,
    base: int,
    warmup_steps: int = 0,
    warmup_period: int | None = None,
    multiple: int = 1,
) -> Period:
    """Linear synchronization rule: H = max(H_base, ⌊α/η_t⌋).

    Arguments, errors and source are those of `qsr`.

    >>> from jaxlocal.periods import lengths
    >>> list(lengths(linear(lambda step: 0.1 / (1 + step), coefficient=0.2, base=1), 60))
    [2, 6, 18, 34]
    """
    return power(
        learning_rate,
        coefficient=coefficient,
        base=base,
        exponent=1,
        warmup_steps=warmup_steps,
        warmup_period=warmup_period,
        multiple=multiple,
    )


def cubic(
    learning_rate: optax.ScalarOrSchedule,
    *,
    coefficient: float,
    base: int,
    warmup_steps: int = 0,
    warmup_period: int | None = None,
    multiple: int = 1,
) -> Period:
    """Cubic synchronization rule: H = max(H_base, ⌊(α/η_t)³⌋).

    Arguments, errors and source are those of `qsr`.

    >>> from jaxlocal.periods import lengths
    >>> list(lengths(cubic(lambda step: 0.1 / (1 + step), coefficient=0.2, base=1), 60))
    [8, 52]
    """
    return power(
        learning_rate,
        coefficient=coefficient,
        base=base,
        exponent=3,
        warmup_steps=warmup_steps,
        warmup_period=warmup_period,
        multiple=multiple,
    )


def power(
    learning_rate: optax.ScalarOrSchedule,
    *,
    coefficient: float,
    base: int,
    exponent: int,
    warmup_steps: int = 0,
    warmup_period: int | None = None,
    multiple: int = 1,
) -> Period:
    """Synchronization rule with any power: H = max(H_base, ⌊(α/η_t)^exponent⌋).

    Args:
      exponent: 1 is `linear`, 2 is `qsr`, 3 is `cubic`, whose other arguments these are.

    >>> falling = lambda step: 0.1 / (1 + step)
    >>> from jaxlocal.periods import lengths
    >>> list(lengths(power(falling, coefficient=0.2, base=1, exponent=2), total_steps=200))
    [4, 100, 96]
    """
    _check_power(coefficient, base, exponent, multiple)
    _check_warmup(warmup_steps, warmup_period, multiple)
    rate_at = rates(learning_rate)

    def steps_at(rate: float, remaining: int) -> int:
        ratio = coefficient / rate if rate > 0 else np.inf if coefficient else 0.0
        # The cap keeps the power finite where the rate is next to nothing.
        wanted = int(min(ratio, remaining + multiple) ** exponent)
        return max(1, min(max(base, wanted - wanted % multiple), remaining))

    def length(step: int, remaining: int) -> int:
        if warmup_period is not None and step < warmup_steps:
            return min(warmup_period, remaining)
        start = max(step, warmup_steps)
        if not rate_at(start) >= 0:
            raise ConfigurationError(
                f"the learning rate must be ≥ 0, got {rate_at(start)} at step {start}"
            )
        rate = rate_at.peak(start)
        steps = steps_at(rate, remaining)
        # The rate may rise again while the round lasts: at a restart, or after a flat start.
        while (above := rate_at.first_above(rate, start, step + steps)) is not None:
            rate = rate_at.peak(above)
            if steps_at(rate, remaining) <= (before := above - step):
                return max(before - before % multiple, steps_at(rate, remaining))
            steps = min(steps, steps_at(rate, remaining))
        return steps

    name = {1: "linear", 2: "quadratic", 3: "cubic"}.get(exponent, f"power {exponent}")
    description = f"{name}, H = max({base}, ⌊({coefficient:g}/η)^{exponent}⌋)"
    if warmup_period is not None:
        description += f", {warmup_period} in the warm-up"
    return Period(length, description, learning_rate)


def _check_power(coefficient: float, base: int, exponent: int, multiple: int) -> None:
    at_least_one("H_base", base)
    if not (is_real(coefficient) and np.isfinite(coefficient) and coefficient >= 0):
        raise ConfigurationError(
            f"the period's coefficient must be a number ≥ 0, got {coefficient!r}"
        )
    at_least_one("the period's multiple", multiple)
    if not (is_real(exponent) and 1 <= exponent <= _HIGHEST):  # no NaN either
        raise ConfigurationError(
            f"the period's exponent must be a number from 1 to {_HIGHEST}, got {exponent!r}"
        )
    if base % multiple:
        raise ConfigurationError(f"H_base = {base} steps is not a multiple of {multiple} steps")


def _check_warmup(warmup_steps: int, warmup_period: int | None, multiple: int) -> None:
    if not isinstance(warmup_steps, numbers.Integral) or warmup_steps < 0:
        raise ConfigurationError(f"a warm-up must be an integer of ≥ 0 steps, got {warmup_steps}")
    if warmup_period is None:
        return
    at_least_one("H in the warm-up", warmup_period)
    if warmup_steps == 0:
        raise ConfigurationError(
            f"H = {warmup_period} in the warm-up needs the length of the warm-up, got 0 steps"
        )
    if warmup_period % multiple:
        raise ConfigurationError(
            f"H = {warmup_period} in the warm-up is not a multiple of {multiple} steps"
        )
