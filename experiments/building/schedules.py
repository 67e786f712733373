"""What goes by steps: the length of a run, its learning rate, its optimizer, and the period of
its averages."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

import jaxlocal
from experiments.building.config import Config
from jaxlocal import ConfigurationError, periods
from jaxlocal.errors import lookup
from jaxlocal.methods import METHODS
from jaxlocal.types import Period

# The learning rate at the start of warm-up and at the end of cosine and linear schedules.
FLOOR = 1e-6
DEFAULT_STEPS = 440
EXPONENTS = {"linear": 1, "quadratic": 2, "cubic": 3}


def make_schedule(config: Config, steps: int) -> Callable[[int], Any]:
    """η by step, for optax and for the period alike: linear warm-up, then the schedule."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(1, steps - warmup)

    def step_decay(step):
        done = 3 * (step + warmup)
        return peak * jnp.where(done >= 2 * steps, 0.01, jnp.where(done >= steps, 0.1, 1.0))

    cosine = optax.cosine_decay_schedule(peak, rest, alpha=min(1.0, FLOOR / peak))
    table = {
        "constant": optax.constant_schedule(peak),
        "cosine": cosine,
        "linear": optax.linear_schedule(peak, min(FLOOR, peak), rest),
        "step": step_decay,
        "cosine_step": lambda step: 2.0 ** jnp.round(jnp.log2(cosine(step))),
    }
    after = lookup("schedule", config.schedule, table)
    if warmup == 0:
        return after
    rise = optax.linear_schedule(min(FLOOR, peak), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: Config, schedule: Callable) -> optax.GradientTransformation:
    """The optimizer of the flags, whose learning rate follows the run's steps."""
    chain = _directions(config.optimizer, config.momentum, config.weight_decay)
    return optax.chain(*chain, jaxlocal.scale_by_step(schedule))


def make_outer_optimizer(config: Config) -> optax.GradientTransformation | None:
    """The outer optimizer of the flags; None where they leave it to the method.

    Raises:
      ConfigurationError: a momentum for an optimizer that has its own.
    """
    default = METHODS[config.method].outer_optimizer
    name, rate, beta = config.outer_optimizer, config.outer_learning_rate, config.outer_momentum
    if default is None or (name, rate, beta) == (None, None, None):
        return None
    if name not in (None, "sgd", "nesterov") and beta is not None:
        raise ConfigurationError(
            f"--outer_momentum={beta} is for sgd and nesterov; --outer_optimizer={name} has its own"
        )
    rate = default.learning_rate if rate is None else rate
    beta = default.momentum if beta is None else beta
    if name is None:
        return default.make(rate, beta)
    return optax.chain(*_directions(name, beta, 0.0), optax.scale(-rate))


def _directions(name: str, beta: float, weight_decay: float) -> tuple:
    """What an optimizer makes of a gradient before the learning rate."""
    plain = optax.identity()
    decay = optax.add_decayed_weights(weight_decay) if weight_decay else plain
    momentum = optax.trace(beta) if beta else plain
    table = {
        "sgd": (decay, momentum),
        "nesterov": (decay, optax.trace(beta, nesterov=True)),
        "adam": (decay, optax.scale_by_adam()),
        "rmsprop": (decay, optax.scale_by_rms()),
        "adagrad": (decay, optax.scale_by_rss()),
        "adamw": (optax.scale_by_adam(), decay),
        "lion": (optax.scale_by_lion(), decay),
        "lamb": (optax.scale_by_adam(), decay, optax.scale_by_trust_ratio()),
    }
    return lookup("optimizer", name, table)


def make_period(config: Config, schedule: Callable, steps: int) -> Period:
    """The rule for H; on hubs in multiples of τ, with fragments in multiples of their number."""
    hubs = has_hubs(config)
    multiple = config.local_steps if hubs else count_fragments(config)
    base = config.local_steps * (config.hub_period if hubs else 1)
    name = period_name(config)
    _check_switch(config, name, steps)
    if hubs and name in ("post_local", "swap"):
        raise ConfigurationError(
            f"the period {name} starts with H = 1, and the rounds of {config.method} are multiples "
            f"of τ = {multiple} steps"
        )

    def power() -> Period:
        exponent, coefficient = EXPONENTS[name], config.period_coefficient
        if coefficient is None:
            coefficient = config.learning_rate * base ** (1 / exponent)
        return periods.power(
            schedule,
            coefficient=coefficient,
            base=base,
            exponent=exponent,
            warmup_steps=config.warmup_steps,
            multiple=multiple,
        )

    every_step = METHODS[config.method].every_step
    table: dict[str, Callable[[], Period]] = {
        "constant": lambda: periods.constant(1 if every_step else base),
        **dict.fromkeys(EXPONENTS, power),
        "post_local": lambda: periods.post_local(switch_step(config, steps), base),
        "swap": lambda: periods.swap(switch_step(config, steps)),
    }
    return lookup("period", name, table)()


def has_hubs(config: Config) -> bool:
    """Whether the workers of the method average in hubs."""
    return METHODS[config.method].network == "hubs"


def switch_step(config: Config, steps: int) -> int:
    """The step until which H = 1, in the periods post_local and swap."""
    return steps // 2 if config.switch_step is None else config.switch_step


def _check_switch(config: Config, period: str, steps: int) -> None:
    switch = config.switch_step
    if switch is not None and (switch > steps or period not in ("post_local", "swap")):
        raise ConfigurationError(
            f"--switch_step={switch} does not fit a run of {steps} steps with the period {period}"
        )


def count_fragments(config: Config) -> int:
    """The number of rounds, one for each fragment of the model, that H is divided into."""
    spec = METHODS[config.method]
    if "fragments" not in spec.own_options:
        return 1
    return spec.default("fragments") if config.fragments is None else config.fragments


def period_name(config: Config) -> str:
    """The rule for the period: that of the flags, or the method's."""
    spec = METHODS[config.method]
    if spec.own_period and config.period not in (None, spec.period):
        raise ConfigurationError(
            f"{config.method} has the period {spec.period!r}, and --period={config.period} was "
            f"given"
        )
    return config.period or spec.period


def count_steps(config: Config) -> int:
    """The steps of the run, counted from its rounds where the flags give those."""
    if config.rounds is None:
        if config.steps is not None:
            return config.steps
        whole = config.local_steps if has_hubs(config) else 1
        return max(whole, DEFAULT_STEPS - DEFAULT_STEPS % whole)
    if config.steps is not None:
        raise ConfigurationError(
            f"give --steps or --rounds, not both: {config.steps} and {config.rounds}"
        )
    name = period_name(config)
    if name == "swap" or (name == "post_local" and config.switch_step is None):
        raise ConfigurationError(
            f"--rounds={config.rounds} does not tell the length of a run with the period {name}; "
            f"give --steps"
        )
    if name in EXPONENTS and config.schedule != "constant":
        raise ConfigurationError(
            f"--rounds={config.rounds} does not tell the length of a run whose period follows a "
            f"{config.schedule} schedule; give --steps"
        )
    endless = 1 << 40
    rule = make_period(config, make_schedule(config, endless), endless)
    period = periods.split(rule, count_fragments(config))
    step = 0
    for _ in range(config.rounds):
        step += period.length(step, endless)
    return step
