"""Periods: rules for H, the steps between two synchronisations. On the host, in Python ints.

A rule may read the learning rate, by the steps of the run and in float64: the same schedule that
the optimizer follows. Every rule is clipped to the steps that remain, so that training always ends
on a synchronisation.

| period | H of the round that starts at step t, where the learning rate is η_t |
|---|---|
| `constant(H)` | H |
| `qsr` | max(H_base, ⌊(α/η_t)²⌋), the Quadratic Synchronization Rule |
| `linear`, `cubic` | max(H_base, ⌊α/η_t⌋), max(H_base, ⌊(α/η_t)³⌋) |
| `post_local` | 1 until a step, then constant |
| `swap` | 1 until a step, then all steps that remain |
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
_COMPARED = (0, 1, 10, 100, 1_000, 10_000, 100_000)  # steps at which two schedules must agree


def constant(steps: int) -> Period:
    """Synchronise every H steps.

    Args:
      steps: H, at least 1.

    >>> list(lengths(constant(4), total_steps=10))
    [4, 4, 2]
    """
    _at_least_one("a period", steps)
    return Period(lambda step, remaining: min(steps, remaining), f"constant, H = {steps}")


def qsr(
    learning_rate: optax.ScalarOrSchedule,
    *,
    coefficient: float,
    base: int,
    warmup_steps: int = 0,
    multiple: int = 1,
) -> Period:
    """Quadratic Synchronization Rule (QSR): synchronise less often as the learning rate falls.

        H^(s) = max(H_base, ⌊(α / η_t)²⌋)

    s numbers the rounds, t is the first step of round s and η_t the learning rate there. H changes
    only right after an average. During warm-up the rule takes the rate right after it, the peak;
    the last round is clipped to the steps that remain.

    Args:
      learning_rate: η by step, as optax has schedules, or a number. Give the schedule once, to the
        optimizer, and read it from there, as in the example.
      coefficient: α ≥ 0, in units of η; at 0 the period is H_base throughout. The paper has 0.0175
        for AdamW on ViT-B with the peak rate 0.008, and 0.2 for SGD on ResNet-152 with 0.8.
      base: H_base, steps; 4 or 8 in the paper.
      warmup_steps: the length of the warm-up.
      multiple: H is rounded down to a multiple of it, which must divide H_base: τ on hubs, the
        number of fragments in streaming DiLoCo.

    Raises:
      ConfigurationError: a coefficient below 0, an H_base that is no multiple; when the length of a
        round is asked for, a learning rate below 0.

    >>> import jaxlocal, optax
    >>> schedule = optax.cosine_decay_schedule(0.1, 200)
    >>> optimizer = jaxlocal.scheduled(optax.sgd, schedule, momentum=0.9)
    >>> rule = qsr(optimizer.learning_rate, coefficient=0.2, base=4)
    >>> list(lengths(rule, total_steps=200))[-5:]
    [9, 14, 24, 56, 11]

    Source: Gu, Lyu, Arora, Zhang, Huang, "A Quadratic Synchronization Rule for Distributed Deep
    Learning", ICLR 2024, https://arxiv.org/abs/2310.14423.
    """
    return power(
        learning_rate,
        coefficient=coefficient,
        base=base,
        exponent=2,
        warmup_steps=warmup_steps,
        multiple=multiple,
    )


def linear(
    learning_rate: optax.ScalarOrSchedule,
    *,
    coefficient: float,
    base: int,
    warmup_steps: int = 0,
    multiple: int = 1,
) -> Period:
    """Linear synchronization rule: H = max(H_base, ⌊α/η_t⌋).

    Arguments, errors and source are those of `qsr`.

    >>> list(lengths(linear(lambda step: 0.1 / (1 + step), coefficient=0.2, base=1), 60))
    [2, 6, 18, 34]
    """
    return power(
        learning_rate,
        coefficient=coefficient,
        base=base,
        exponent=1,
        warmup_steps=warmup_steps,
        multiple=multiple,
    )


def cubic(
    learning_rate: optax.ScalarOrSchedule,
    *,
    coefficient: float,
    base: int,
    warmup_steps: int = 0,
    multiple: int = 1,
) -> Period:
    """Cubic synchronization rule: H = max(H_base, ⌊(α/η_t)³⌋).

    Arguments, errors and source are those of `qsr`.

    >>> list(lengths(cubic(lambda step: 0.1 / (1 + step), coefficient=0.2, base=1), 60))
    [8, 52]
    """
    return power(
        learning_rate,
        coefficient=coefficient,
        base=base,
        exponent=3,
        warmup_steps=warmup_steps,
        multiple=multiple,
    )


def power(
    learning_rate: optax.ScalarOrSchedule,
    *,
    coefficient: float,
    base: int,
    exponent: int,
    warmup_steps: int = 0,
    multiple: int = 1,
) -> Period:
    """Synchronization rule with any power: H = max(H_base, ⌊(α/η_t)^exponent⌋).

    Args:
      exponent: 1 is `linear`, 2 is `qsr`, 3 is `cubic`, whose other arguments these are.

    >>> falling = lambda step: 0.1 / (1 + step)
    >>> list(lengths(power(falling, coefficient=0.2, base=1, exponent=2), total_steps=200))
    [4, 100, 96]
    """
    _check_power(coefficient, base, exponent, multiple)
    rate_at = rates(learning_rate)

    def length(step: int, remaining: int) -> int:
        rate = rate_at(max(step, warmup_steps))
        if not rate >= 0:
            raise ConfigurationError(f"the learning rate must be ≥ 0, got {rate} at step {step}")
        ratio = coefficient / rate if rate > 0 else np.inf if coefficient else 0.0
        # The cap keeps the power finite where the rate is next to nothing.
        wanted = int(min(ratio, remaining) ** exponent)
        return max(1, min(max(base, wanted - wanted % multiple), remaining))

    name = {1: "linear", 2: "quadratic", 3: "cubic"}.get(exponent, f"power {exponent}")
    description = f"{name}, H = max({base}, ⌊({coefficient:g}/η)^{exponent}⌋)"
    return Period(length, description, learning_rate)


def post_local(switch_step: int, steps: int) -> Period:
    """Synchronise at every step until the switch, then every H steps.

    Args:
      switch_step: the step from which on H holds, ≥ 0.
      steps: H.

    Source: Lin, Stich, Patel, Jaggi, "Don't Use Large Mini-Batches, Use Local SGD", ICLR 2020,
    https://arxiv.org/abs/1808.07217.

    >>> list(lengths(post_local(3, 4), total_steps=10))
    [1, 1, 1, 4, 3]
    """
    _at_least_one("a period", steps)
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

    >>> list(lengths(swap(2), total_steps=10))
    [1, 1, 8]
    """
    _check_switch(switch_step)
    return Period(
        lambda step, remaining: 1 if step < switch_step else remaining,
        f"SWAP, H = 1 until step {switch_step}, then one average at the end",
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
        steps = whole.length(step, parts * remaining)
        if steps % parts:
            raise ConfigurationError(
                f"a period of {steps} steps does not divide into {parts} rounds"
            )
        return steps // parts

    description = f"{whole.description}, in {parts} rounds"
    return Period(length, description, whole.learning_rate)


def of(period: Period | int, optimizer: optax.GradientTransformation | None = None) -> Period:
    """The period of a method: a rule as it is, a number of steps as the constant rule.

    Raises:
      ConfigurationError: the rule reads another learning rate than the optimizer follows, where the
        optimizer knows it (see `jaxlocal.scheduled`).
    """
    rule = period if isinstance(period, Period) else constant(period)
    follows = getattr(optimizer, "learning_rate", None)
    if follows is not None and rule.learning_rate is not None and rule.learning_rate is not follows:
        ours, theirs = rates(rule.learning_rate), rates(follows)
        for step in _COMPARED:
            if not np.isclose(ours(step), theirs(step), rtol=1e-6, atol=0):
                raise ConfigurationError(
                    f"the period reads the learning rate {ours(step):g} at step {step}, and the "
                    f"optimizer follows {theirs(step):g} there; give both the same schedule"
                )
    return rule


def lengths(period: Period, total_steps: int) -> Iterator[int]:
    """H of every round of a run, one after another; they sum to the total.

    >>> list(lengths(constant(3), total_steps=7))
    [3, 3, 1]
    """
    step = 0
    while step < total_steps:
        yield (steps := period.length(step, total_steps - step))
        step += steps


def rates(learning_rate: optax.ScalarOrSchedule) -> Callable[[int], float]:
    """The learning rate by step as Python floats, evaluated in float64, many steps at once.

    In float32 a rate of 0.1 is a little more than 0.1, and ⌊(0.2/η)²⌋ would be 3.

    >>> rates(lambda step: 0.1 / (1 + step))(1)
    0.05
    """
    if not callable(learning_rate):
        number = float(learning_rate)
        return lambda step: number
    many = jax.jit(jax.vmap(lambda step: jnp.asarray(learning_rate(step), jnp.float64)))

    @functools.cache
    def block(number: int) -> np.ndarray:
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            return np.asarray(many(np.arange(_BLOCK, dtype=np.int64) + number * _BLOCK))

    return lambda step: float(block(step // _BLOCK)[step % _BLOCK])


def _check_power(coefficient: float, base: int, exponent: int, multiple: int) -> None:
    _at_least_one("H_base", base)
    if not (np.isfinite(coefficient) and coefficient >= 0):
        raise ConfigurationError(
            f"the period's coefficient must be a number ≥ 0, got {coefficient:g}"
        )
    _at_least_one("the period's multiple", multiple)
    if exponent < 1:
        raise ConfigurationError(f"the period's exponent must be at least 1, got {exponent}")
    if base % multiple:
        raise ConfigurationError(f"H_base = {base} steps is not a multiple of {multiple} steps")


def _check_switch(switch_step: int) -> None:
    if switch_step < 0:
        raise ConfigurationError(
            f"the switch to local steps must be at a step ≥ 0, got {switch_step}"
        )


def _at_least_one(what: str, steps: int) -> None:
    if not isinstance(steps, numbers.Integral) or steps < 1:
        raise ConfigurationError(f"{what} must be an integer of at least 1 step, got {steps}")
