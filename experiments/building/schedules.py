"""From flags to the length of a run, its learning rate and its period."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from experiments.building.checks import MOST
from experiments.building.config import Config
from experiments.building.epochs import numbers_of
from jaxlocal import ConfigurationError, periods
from jaxlocal.errors import lookup
from jaxlocal.methods import METHODS
from jaxlocal.types import Period

# The learning rate at the start of warm-up and at the end of cosine and linear schedules.
FLOOR = 1e-6
DEFAULT_STEPS = 440
EXPONENTS = {"linear": 1, "quadratic": 2, "cubic": 3}
# α of the quadratic rule over the peak learning rate, as the paper tunes it: .25 to .31 for SGD on
# ResNet-152, 2.19 for AdamW on ViT-B.
COEFFICIENTS, ADAPTIVE_COEFFICIENT = {"sgd": 0.25, "nesterov": 0.25}, 2.2
SWITCHED = ("post_local", "swap")  # periods with H = 1 until a step


def make_schedule(config: Config, steps: int) -> Callable[[int], Any]:
    """Learning rate η by step, for optimizer and period: linear warm-up, then the schedule.

    Raises:
      ConfigurationError: an unknown schedule, a warm-up that is longer than the run, or decays
        that do not fit the run or the schedule.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup > steps:
        raise ConfigurationError(f"a warm-up of {warmup} steps is longer than the run of {steps}")
    _check_decays(config)
    after = lookup("schedule", config.schedule, _schedules(config, steps))()
    if warmup == 0:
        return after
    rise = optax.linear_schedule(min(FLOOR, peak), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def _schedules(config: Config, steps: int) -> dict[str, Callable[[], Callable[[int], Any]]]:
    """The schedules of the steps after the warm-up, by name."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(1, steps - warmup)
    cosine = optax.cosine_decay_schedule(peak, rest, alpha=min(1.0, FLOOR / peak))
    return {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: cosine,
        "linear": lambda: optax.linear_schedule(peak, min(FLOOR, peak), rest),
        "step": lambda: _step_decay(config, steps),
        "cosine_step": lambda: lambda step: 2.0 ** jnp.round(jnp.log2(cosine(step))),
    }


def _step_decay(config: Config, steps: int) -> Callable[[int], Any]:
    decays = _decay_steps(config, steps)

    def rate_at(step: Any) -> Any:
        rate: Any = config.learning_rate
        for number, at in enumerate(decays, 1):
            lower = config.learning_rate * config.decay_factor**number
            rate = jnp.where(step + config.warmup_steps >= at, lower, rate)
        return rate

    return rate_at


def _decay_steps(config: Config, steps: int) -> list[int]:
    """The steps of the run from which on the schedule step lowers the learning rate."""
    if config.decay_steps is None:
        return [-(-steps // 3), -(-2 * steps // 3)]
    decays = numbers_of("decay_steps", config.decay_steps)
    if not all(at.is_integer() for at in decays) or decays[-1] >= steps:
        raise ConfigurationError(
            f"the learning rate must decay at whole steps within the run of {steps} steps, got "
            f"{config.decay_steps:.99}"
        )
    return [int(at) for at in decays]


def _check_decays(config: Config) -> None:
    if config.decay_steps is not None and config.schedule != "step":
        raise ConfigurationError(
            f"the learning rate decays at given steps in --schedule=step, not in "
            f"--schedule={config.schedule}"
        )


def make_period(config: Config, schedule: Callable, steps: int) -> Period:
    """The rule for H: on hubs a multiple of τ, with fragments a multiple of their number.

    Raises:
      ConfigurationError: an unknown period, or one that does not fit the method or the run.
    """
    hubs, name = has_hubs(config), period_name(config)
    base = config.local_steps * (config.hub_period if hubs else 1)
    if config.switch_step is not None:
        _check_switch(name, config.switch_step, steps)
    if hubs and name in SWITCHED:
        raise ConfigurationError(
            f"the period {name} starts with H = 1, and the rounds of {config.method} are multiples "
            f"of τ = {config.local_steps} steps"
        )
    if config.warmup_local_steps is not None and name not in EXPONENTS:
        raise ConfigurationError(
            f"--warmup_local_steps={config.warmup_local_steps} is for the periods "
            f"{', '.join(EXPONENTS)}, not for {name}"
        )
    power = functools.partial(_power, config, name, schedule, base)
    every_step = METHODS[config.method].every_step
    table: dict[str, Callable[[], Period]] = {
        "constant": lambda: periods.constant(1 if every_step else base),
        **dict.fromkeys(EXPONENTS, power),
        "post_local": lambda: periods.post_local(switch_step(config, steps), base),
        "swap": lambda: periods.swap(switch_step(config, steps)),
    }
    return lookup("period", name, table)()


def _power(config: Config, name: str, schedule: Callable, base: int) -> Period:
    """The rule H = max(H_base, ⌊(α/η)^exponent⌋)."""
    exponent, coefficient = EXPONENTS[name], config.period_coefficient
    if coefficient is None:
        coefficient = config.learning_rate * _default_ratio(config.optimizer, base, exponent)
    return periods.power(
        schedule,
        coefficient=coefficient,
        base=base,
        exponent=exponent,
        warmup_steps=config.warmup_steps,
        warmup_period=config.warmup_local_steps,
        multiple=config.local_steps if has_hubs(config) else count_fragments(config),
    )


def _default_ratio(optimizer: str, base: int, exponent: int) -> float:
    """α over the peak learning rate: that of the paper for the quadratic rule, and for the others
    the one with which H grows to H_base + 1 at the same learning rate.

    Never so much that H is more than H_base at the peak.
    """
    ratio = COEFFICIENTS.get(optimizer, ADAPTIVE_COEFFICIENT)
    if ratio**2 >= base + 1:
        ratio = base**0.5
    return ratio * (base + 1) ** (1 / exponent - 1 / 2)


def has_hubs(config: Config) -> bool:
    """Whether the workers of the method average in hubs."""
    return METHODS[config.method].network == "hubs"


def switch_step(config: Config, steps: int) -> int:
    """The step until which H = 1, in the periods post_local and swap."""
    return steps // 2 if config.switch_step is None else config.switch_step


def _check_switch(period: str, switch: int, steps: int) -> None:
    if switch > steps or period not in SWITCHED:
        raise ConfigurationError(
            f"--switch_step={switch} does not fit a run of {steps} steps with the period {period}"
        )


def count_fragments(config: Config) -> int:
    """Number of rounds, of one fragment each, into which H is divided."""
    spec = METHODS[config.method]
    if "fragments" not in spec.own_options:
        return 1
    return spec.default("fragments") if config.fragments is None else config.fragments


def period_name(config: Config) -> str:
    """Name of the period: that of the flags, or the default of the method.

    Raises:
      ConfigurationError: a period that the method does not have.
    """
    spec = METHODS[config.method]
    if spec.own_period and config.period not in (None, spec.period):
        raise ConfigurationError(
            f"{config.method} has the period {spec.period!r}, and --period={config.period} was "
            f"given"
        )
    return config.period or spec.period


def count_steps(config: Config) -> int:
    """Number of steps in the run: that of the flags, or of as many rounds as the flags give.

    Raises:
      ConfigurationError: steps and rounds are both given, the number of rounds does not determine
        the number of steps, or there are too many.
    """
    steps = _count(config)
    if steps > MOST["steps"]:
        raise ConfigurationError(
            f"the run has {steps} steps by its other flags, and may have {MOST['steps']}"
        )
    return steps


def _count(config: Config) -> int:
    if config.rounds is not None:
        return _steps_of_rounds(config, config.rounds)
    if config.steps is not None:
        return config.steps
    whole = config.local_steps if has_hubs(config) else 1
    return max(whole, DEFAULT_STEPS - DEFAULT_STEPS % whole)


def _steps_of_rounds(config: Config, rounds: int) -> int:
    name = period_name(config)
    if config.steps is not None:
        raise ConfigurationError(f"give --steps or --rounds, not both: {config.steps} and {rounds}")
    if name == "swap" or (name == "post_local" and config.switch_step is None):
        raise ConfigurationError(
            f"--rounds={rounds} does not determine the length of a run with the period {name}; "
            f"give --steps"
        )
    if name in EXPONENTS and config.schedule != "constant":
        raise ConfigurationError(
            f"--rounds={rounds} does not determine the length of a run whose period follows a "
            f"{config.schedule} schedule; give --steps"
        )
    endless = 1 << 40
    rule = make_period(config, make_schedule(config, endless), endless)
    period = periods.split(rule, count_fragments(config))
    step = 0
    for _ in range(rounds):
        step += period.length(step, endless)
    return step
