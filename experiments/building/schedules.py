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
from jaxlocal.types import Period

# The learning rate at the start of warm-up and at the end of cosine and linear schedules.
FLOOR = 1e-6
DEFAULT_STEPS = 440
HUB_METHODS = ("mll_sgd", "hl_sgd")
EVERY_STEP = ("data_parallel", "ef_sgd", "csea")  # H = 1
OWN_PERIODS = {
    **dict.fromkeys(EVERY_STEP, "constant"),
    "post_local_sgd": "post_local",
    "swap": "swap",
}
# By method: outer optimizer, its learning rate and its momentum.
OUTER_DEFAULTS = {
    "slowmo": ("sgd", 1.0, 0.7),
    "diloco": ("nesterov", 0.7, 0.9),
    "sparse_loco": ("sgd", 1.0, 0.0),
    "streaming_diloco": ("nesterov", 0.7, 0.9),
}
# Of streaming_diloco.
STREAMING_DEFAULTS = {"fragments": 2, "delay_steps": 1, "mixing_factor": 0.5}
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


def make_outer_optimizer(config: Config) -> optax.GradientTransformation:
    """What steps on averages; the papers' where the flags are silent."""
    name, rate, beta = OUTER_DEFAULTS[config.method]
    name = config.outer_optimizer or name
    rate = rate if config.outer_learning_rate is None else config.outer_learning_rate
    beta = beta if config.outer_momentum is None else config.outer_momentum
    if config.outer_momentum is not None and name not in ("sgd", "nesterov"):
        raise ConfigurationError(
            f"--outer_momentum={beta} is for sgd and nesterov; --outer_optimizer={name} has its own"
        )
    return optax.chain(*_directions(name, beta, 0.0), optax.scale(-rate))


def streaming_options(config: Config) -> dict[str, Any]:
    """What streaming_diloco is handed of the flags."""
    given = {name: getattr(config, name) for name in STREAMING_DEFAULTS}
    return STREAMING_DEFAULTS | {name: value for name, value in given.items() if value is not None}


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
    hubs = config.method in HUB_METHODS
    multiple = config.local_steps if hubs else count_fragments(config)
    base = config.local_steps * (config.hub_period if hubs else 1)
    name = period_name(config)
    exponent = EXPONENTS.get(name, 2)
    coefficient = config.period_coefficient
    if coefficient is None:
        coefficient = config.learning_rate * base ** (1 / exponent)
    switch = steps // 2 if config.switch_step is None else config.switch_step
    if config.switch_step is not None and (switch > steps or name not in ("post_local", "swap")):
        raise ConfigurationError(
            f"--switch_step={switch} does not fit a run of {steps} steps with the period {name}"
        )
    if hubs and name in ("post_local", "swap"):
        raise ConfigurationError(
            f"the period {name} starts with H = 1, and the rounds of {config.method} are "
            f"multiples of "
            f"τ = {multiple} steps"
        )

    def power() -> Period:
        warmup = config.warmup_steps
        return periods.power(schedule, coefficient, base, exponent, warmup, multiple)

    one = config.method in EVERY_STEP
    table: dict[str, Callable[[], Period]] = {
        "constant": lambda: periods.constant(1 if one else base),
        **dict.fromkeys(EXPONENTS, power),
        "post_local": lambda: periods.post_local(switch, base),
        "swap": lambda: periods.swap(switch),
    }
    return lookup("period", name, table)()


def count_fragments(config: Config) -> int:
    """Into how many rounds, of a fragment each, H is divided."""
    return streaming_options(config)["fragments"] if config.method == "streaming_diloco" else 1


def period_name(config: Config) -> str:
    """The period of the flags, or the method's."""
    own = OWN_PERIODS.get(config.method)
    if own and config.period not in (None, own):
        raise ConfigurationError(
            f"{config.method} has the period {own!r}, and --period={config.period} was asked for"
        )
    return config.period or own or ("quadratic" if config.method == "local_sgd" else "constant")


def count_steps(config: Config) -> int:
    """The steps of the run, counted from its rounds where the flags give those."""
    if config.rounds is None:
        if config.steps is not None:
            return config.steps
        whole = config.local_steps if config.method in HUB_METHODS else 1
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
