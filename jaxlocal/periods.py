"""When to synchronise: rules from the learning-rate schedule to H, the steps of a round. On the
host, in Python ints.

A rule reads the schedule that the optimizer reads, by global steps, in float64. Every rule is
clipped to the steps that remain, so that training always ends on a synchronisation.

Source of the rules in the learning rate: Gu, Lyu, Arora, Zhang, Huang, "A Quadratic Synchronization
Rule for Distributed Deep Learning", ICLR 2024, https://arxiv.org/abs/2310.14423.
"""

import functools
import numbers
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlocal.errors import ConfigurationError
from jaxlocal.types import Period

_BLOCK = 4096  # steps of a schedule that are evaluated at once


def constant(steps: int) -> Period:
    """H steps a round.

    >>> list(lengths(constant(4), total_steps=10))
    [4, 4, 2]
    """
    _at_least_one("a period", steps)
    return Period(lambda step, remaining: min(steps, remaining), f"constant, H = {steps}")


def of(period: Period | int) -> Period:
    """A rule as it is, and a number of steps as the constant rule."""
    return period if isinstance(period, Period) else constant(period)


def power(
    schedule: optax.ScalarOrSchedule,
    coefficient: float,
    base: int,
    exponent: int,
    warmup_steps: int = 0,
    multiple: int = 1,
) -> Period:
    """H = max(H_base, ⌊(α/η_t)^exponent⌋), η_t the learning rate of the round's first step.

    Exponent 2 is the quadratic rule (QSR), 1 the linear and 3 the cubic one. During warm-up η is
    the rate right after it.

    Args:
      schedule: η by step, as optax has it, or a number.
      coefficient: α ≥ 0; at 0 the period is H_base throughout.
      base: H_base, steps.
      warmup_steps: length of the warm-up.
      multiple: H is rounded down to a multiple of it (τ on hubs), which must divide H_base.

    >>> falling = lambda step: 0.1 / (1 + step)
    >>> list(lengths(power(falling, 0.2, base=1, exponent=2), total_steps=200))
    [4, 100, 96]
    """
    _at_least_one("H_base", base)
    if not (np.isfinite(coefficient) and coefficient >= 0):
        raise ConfigurationError(
            f"the period's coefficient must be a number ≥ 0, got {coefficient:g}"
        )
    _at_least_one("the period's multiple", multiple)
    if exponent < 1:
        raise ConfigurationError(f"the period's exponent must be at least 1, got {exponent}")
    if base % multiple:
        raise ConfigurationError(
            f"H_base = {base} steps is not a multiple of the {multiple} steps between hub averages"
        )

    rate_at = rates(schedule)

    def length(step: int, remaining: int) -> int:
        rate = rate_at(max(step, warmup_steps))
        if not rate >= 0:
            raise ConfigurationError(f"the learning rate must be ≥ 0, got {rate} at step {step}")
        ratio = coefficient / rate if rate > 0 else np.inf if coefficient else 0.0
        wanted = int(
            min(ratio, remaining) ** exponent
        )  # the cap keeps it finite where the rate is next to nothing
        return max(1, min(max(base, wanted - wanted % multiple), remaining))

    name = {1: "linear", 2: "quadratic", 3: "cubic"}.get(exponent, f"power {exponent}")
    return Period(length, f"{name}, H = max({base}, ⌊({coefficient:g}/η)^{exponent}⌋)")


def quadratic(
    schedule: optax.ScalarOrSchedule, coefficient: float, base: int, **options: int
) -> Period:
    """QSR: H = max(H_base, ⌊(α/η)²⌋); see `power`."""
    return power(schedule, coefficient, base, 2, **options)


def linear(
    schedule: optax.ScalarOrSchedule, coefficient: float, base: int, **options: int
) -> Period:
    """H = max(H_base, ⌊α/η⌋); see `power`."""
    return power(schedule, coefficient, base, 1, **options)


def cubic(
    schedule: optax.ScalarOrSchedule, coefficient: float, base: int, **options: int
) -> Period:
    """H = max(H_base, ⌊(α/η)³⌋); see `power`."""
    return power(schedule, coefficient, base, 3, **options)


def post_local(switch_step: int, steps: int) -> Period:
    """H = 1 until the switch, then constant.

    Source: Lin, Stich, Patel, Jaggi, "Don't Use Large Mini-Batches, Use Local SGD", ICLR 2020.

    >>> list(lengths(post_local(3, 4), total_steps=10))
    [1, 1, 1, 4, 3]
    """
    _at_least_one("a period", steps)
    if switch_step < 0:
        raise ConfigurationError(
            f"the switch to local steps must be at a step ≥ 0, got {switch_step}"
        )
    return Period(
        lambda step, remaining: 1 if step < switch_step else min(steps, remaining),
        f"post-local, H = 1 until step {switch_step}, then {steps}",
    )


def swap(switch_step: int) -> Period:
    """H = 1 until the switch, then one average at the end of training.

    Source: Gupta, Serrano, DeCoste, "Stochastic Weight Averaging in Parallel", ICLR 2020.

    >>> list(lengths(swap(2), total_steps=10))
    [1, 1, 8]
    """
    if switch_step < 0:
        raise ConfigurationError(
            f"the switch to local steps must be at a step ≥ 0, got {switch_step}"
        )
    return Period(
        lambda step, remaining: 1 if step < switch_step else remaining,
        f"SWAP, H = 1 until step {switch_step}, then one average at the end",
    )


def split(period: Period | int, parts: int) -> Period:
    """Rounds of H / parts steps: so many of them take as long as one round of the rule.

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
        steps = whole.length(step, parts * remaining)
        if steps % parts:
            raise ConfigurationError(
                f"a period of {steps} steps does not divide into {parts} rounds"
            )
        return steps // parts

    return Period(length, f"{whole.description}, in {parts} rounds")


def lengths(period: Period, total_steps: int) -> Iterator[int]:
    """H of every round of a run, in turn; they sum to the total."""
    step = 0
    while step < total_steps:
        yield (steps := period.length(step, total_steps - step))
        step += steps


def rates(schedule: optax.ScalarOrSchedule) -> Callable[[int], float]:
    """η by step as Python floats: the optimizer's own schedule, evaluated in float64, many steps at
    once.

    In float32 a rate of 0.1 is a little more than 0.1, and ⌊(0.2/η)²⌋ would be 3.

    >>> rates(lambda step: 0.1 / (1 + step))(1)
    0.05
    """
    if not callable(schedule):
        return lambda step: float(schedule)
    many = jax.jit(jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float64)))

    @functools.cache
    def block(number: int) -> np.ndarray:
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            return np.asarray(many(np.arange(_BLOCK, dtype=np.int64) + number * _BLOCK))

    return lambda step: float(block(step // _BLOCK)[step % _BLOCK])


def _at_least_one(what: str, steps: int) -> None:
    if not isinstance(steps, numbers.Integral) or steps < 1:
        raise ConfigurationError(f"{what} must be an integer of at least 1 step, got {steps}")
