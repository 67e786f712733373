"""When to synchronise: rules from the learning-rate schedule to H, the ticks of a round. On the
host, in Python ints.

A rule reads the schedule that the optimizer reads, by global ticks, in float64. Every rule is
clipped to the ticks that remain, so that training always ends on a synchronisation.

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

_BLOCK = 4096  # ticks of a schedule that are evaluated at once


def constant(ticks: int) -> Period:
    """H ticks a round.

    >>> list(lengths(constant(4), total_ticks=10))
    [4, 4, 2]
    """
    _at_least_one("a period", ticks)
    return Period(lambda tick, remaining: min(ticks, remaining), f"constant, H = {ticks}")


def of(period: Period | int) -> Period:
    """A rule as it is, and a number of ticks as the constant rule."""
    return period if isinstance(period, Period) else constant(period)


def power(
    schedule: optax.ScalarOrSchedule,
    coefficient: float,
    base: int,
    exponent: int,
    warmup_ticks: int = 0,
    multiple: int = 1,
) -> Period:
    """H = max(H_base, ⌊(α/η_t)^exponent⌋), η_t the learning rate of the round's first tick.

    Exponent 2 is the quadratic rule (QSR), 1 the linear and 3 the cubic one. During warm-up η is
    the rate right after it.

    Args:
      schedule: η by tick, as optax has it, or a number.
      coefficient: α ≥ 0; at 0 the period is H_base throughout.
      base: H_base, ticks.
      warmup_ticks: length of the warm-up.
      multiple: H is rounded down to a multiple of it (τ on hubs), which must divide H_base.

    >>> falling = lambda tick: 0.1 / (1 + tick)
    >>> list(lengths(power(falling, 0.2, base=1, exponent=2), total_ticks=200))
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
            f"H_base = {base} ticks is not a multiple of the {multiple} ticks between hub averages"
        )

    rate_at = rates(schedule)

    def length(tick: int, remaining: int) -> int:
        rate = rate_at(max(tick, warmup_ticks))
        if not rate >= 0:
            raise ConfigurationError(f"the learning rate must be ≥ 0, got {rate} at tick {tick}")
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


def post_local(switch_tick: int, ticks: int) -> Period:
    """H = 1 until the switch, then constant.

    Source: Lin, Stich, Patel, Jaggi, "Don't Use Large Mini-Batches, Use Local SGD", ICLR 2020.

    >>> list(lengths(post_local(3, 4), total_ticks=10))
    [1, 1, 1, 4, 3]
    """
    _at_least_one("a period", ticks)
    if switch_tick < 0:
        raise ConfigurationError(
            f"the switch to local steps must be at a tick ≥ 0, got {switch_tick}"
        )
    return Period(
        lambda tick, remaining: 1 if tick < switch_tick else min(ticks, remaining),
        f"post-local, H = 1 until tick {switch_tick}, then {ticks}",
    )


def swap(switch_tick: int) -> Period:
    """H = 1 until the switch, then one average at the end of training.

    Source: Gupta, Serrano, DeCoste, "Stochastic Weight Averaging in Parallel", ICLR 2020.

    >>> list(lengths(swap(2), total_ticks=10))
    [1, 1, 8]
    """
    if switch_tick < 0:
        raise ConfigurationError(
            f"the switch to local steps must be at a tick ≥ 0, got {switch_tick}"
        )
    return Period(
        lambda tick, remaining: 1 if tick < switch_tick else remaining,
        f"SWAP, H = 1 until tick {switch_tick}, then one average at the end",
    )


def split(period: Period | int, parts: int) -> Period:
    """Rounds of H / parts ticks: so many of them take as long as one round of the rule.

    >>> list(lengths(split(8, 4), total_ticks=11))
    [2, 2, 2, 2, 2, 1]
    """
    if not isinstance(parts, numbers.Integral) or parts < 1:
        raise ConfigurationError(
            f"the rounds of a period must be an integer of at least 1, got {parts}"
        )
    whole = of(period)
    if parts == 1:
        return whole

    def length(tick: int, remaining: int) -> int:
        ticks = whole.length(tick, parts * remaining)
        if ticks % parts:
            raise ConfigurationError(
                f"a period of {ticks} ticks does not divide into {parts} rounds"
            )
        return ticks // parts

    return Period(length, f"{whole.description}, in {parts} rounds")


def lengths(period: Period, total_ticks: int) -> Iterator[int]:
    """H of every round of a run, in turn; they sum to the total."""
    tick = 0
    while tick < total_ticks:
        yield (ticks := period.length(tick, total_ticks - tick))
        tick += ticks


def rates(schedule: optax.ScalarOrSchedule) -> Callable[[int], float]:
    """η by tick as Python floats: the optimizer's own schedule, evaluated in float64, many ticks at
    once.

    In float32 a rate of 0.1 is a little more than 0.1, and ⌊(0.2/η)²⌋ would be 3.

    >>> rates(lambda tick: 0.1 / (1 + tick))(1)
    0.05
    """
    if not callable(schedule):
        return lambda tick: float(schedule)
    many = jax.jit(jax.vmap(lambda tick: jnp.asarray(schedule(tick), jnp.float64)))

    @functools.cache
    def block(number: int) -> np.ndarray:
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            return np.asarray(many(np.arange(_BLOCK, dtype=np.int64) + number * _BLOCK))

    return lambda tick: float(block(tick // _BLOCK)[tick % _BLOCK])


def _at_least_one(what: str, ticks: int) -> None:
    if not isinstance(ticks, numbers.Integral) or ticks < 1:
        raise ConfigurationError(f"{what} must be an integer of at least 1 tick, got {ticks}")
