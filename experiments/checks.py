"""What no later piece checks of a config: the ranges of its numbers, and what goes together."""

import math
from typing import Any

from experiments.config import Config
from experiments.schedules import OUTER_DEFAULTS
from jaxlocal import ConfigurationError
from jaxlocal.errors import lookup

MODEL_STATES = ("keep", "average", "reestimate")


def check_numbers(config: Config) -> None:
    """Ranges that no later piece checks."""
    least = {
        "workers": 1,
        "hubs": 1,
        "local_steps": 1,
        "hub_period": 1,
        "batch_size": 1,
        "ticks": 1,
        "rounds": 1,
        "accumulation": 1,
        "seeds": 1,
        "keep": 1,
    }
    least |= {
        "warmup_ticks": 0,
        "train_eval_examples": 0,
        "eval_every": 0,
        "switch_tick": 0,
        "parameters": 1,
        "seed": 0,
        "checkpoint_every": 0,
        "stream_workers": 0,
        "test_eval_examples": 0,
    }
    if config.seed + config.seeds > 1 << 32:
        raise ConfigurationError(f"--seed must be less than 2^32, got {config.seed}")
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise ConfigurationError(f"--{name} must be at least {bound}, got {value}")
    if config.batch_size % config.accumulation:
        raise ConfigurationError(
            f"--accumulation={config.accumulation} does not divide --batch_size={config.batch_size}"
        )
    lookup("model state option", config.model_state, dict.fromkeys(MODEL_STATES))
    _check_outer(config)
    if not 0 < config.learning_rate < math.inf:
        raise ConfigurationError(
            f"--learning_rate must be a number > 0, got {config.learning_rate}"
        )
    if not 0 <= config.momentum < 1:
        raise ConfigurationError(f"--momentum must be in [0, 1), got {config.momentum}")
    if not 0 <= config.weight_decay < math.inf:
        raise ConfigurationError(f"--weight_decay must be a number ≥ 0, got {config.weight_decay}")
    if config.stop_train_loss is not None and not math.isfinite(config.stop_train_loss):
        raise ConfigurationError(
            f"--stop_train_loss must be a number, got {config.stop_train_loss}"
        )


def _check_outer(config: Config) -> None:
    given = [n for n in ("optimizer", "learning_rate", "momentum") if _outer(config, n) is not None]
    if given and config.method not in OUTER_DEFAULTS:
        name = given[0]
        raise ConfigurationError(
            f"--outer_{name}={_outer(config, name)} is for {' and '.join(OUTER_DEFAULTS)}; "
            f"{config.method} has no outer optimizer"
        )
    rate, beta = config.outer_learning_rate, config.outer_momentum
    if rate is not None and not 0 < rate < math.inf:
        raise ConfigurationError(f"--outer_learning_rate must be a number > 0, got {rate}")
    if beta is not None and not 0 <= beta < 1:
        raise ConfigurationError(f"--outer_momentum must be in [0, 1), got {beta}")


def _outer(config: Config, name: str) -> Any:
    return getattr(config, f"outer_{name}")
