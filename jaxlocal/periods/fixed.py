"""Periods that do not depend on the learning rate."""

import numbers
from typing import Any

from jaxlocal.errors import ConfigurationError
from jaxlocal.types import Period


def constant(steps: int) -> Period:
    """Synchronise every H steps.

    Args:
      steps: H, at least 1.

    >>> from jaxlocal.periods import lengths
    >>> list(lengths(constant(4), total_steps=10))
    [4, 4, 2]
    """
    at_least_one("a period", steps)
    length = lambda step, remaining: min(steps, remaining)
    return Period(length, f"constant, H = {steps}", constant=True)


def post_local(switch_step: int, steps: int) -> Period:
    """Synchronise at every step until the switch, then every H steps.

    Args:
      switch_step: the step from which on H holds, ≥ 0.
      steps: H.

    Source: Lin, Stich, Patel, Jaggi, "Don't Use Large Mini-Batches, Use Local SGD", ICLR 2020,
    https://arxiv.org/abs/1808.07217.

    >>> from jaxlocal.periods import lengths
    >>> list(lengths(post_local(3, 4), total_steps=10))
    [1, 1, 1, 4, 3]
    """
    at_least_one("a period", steps)
    _check_switch(switch_step)
    return Period(
        lambda step, remaining: 1 if step < switch_step else min(steps, remaining),
        f"post-local, H = 1 until step {switch_step}, then {steps}",
    )


def swap(switch_step: int) -> Period:
    """Synchronise at every step until the switch, then once at the end of training.

    Args:
      switch_step: the step from which on workers train alone, ≥ 0.

    Source: Gupta, Serrano, DeCoste, "Stochastic Weight Averaging in Parallel", ICLR 2020,
    https://arxiv.org/abs/2001.02312.

    >>> from jaxlocal.periods import lengths
    >>> list(lengths(swap(2), total_steps=10))
    [1, 1, 8]
    """
    _check_switch(switch_step)
    return Period(
        lambda step, remaining: 1 if step < switch_step else remaining,
        f"SWAP, H = 1 until step {switch_step}, then one average at the end",
    )


def at_least_one(what: str, steps: Any) -> None:
    """Raise ConfigurationError where a number of steps is not an integer of at least 1."""
    if not isinstance(steps, numbers.Integral) or isinstance(steps, bool) or steps < 1:
        raise ConfigurationError(f"{what} must be an integer of at least 1 step, got {steps!r}")


def _check_switch(switch_step: Any) -> None:
    integer = isinstance(switch_step, numbers.Integral) and not isinstance(switch_step, bool)
    if not integer or switch_step < 0:
        raise ConfigurationError(
            f"the switch to local steps must be at an integer step ≥ 0, got {switch_step!r}"
        )
