"""Checks of a config: ranges of its numbers, and flags that exclude each other."""

import dataclasses
import math
import re
from typing import Any

from experiments.building.config import Config
from jaxlocal import ConfigurationError
from jaxlocal.errors import lookup
from jaxlocal.methods import METHODS

MODEL_STATES = ("keep", "average", "reestimate")
LEAST = {
    **dict.fromkeys(("workers", "hubs", "local_steps", "hub_period", "batch_size"), 1),
    **dict.fromkeys(("steps", "rounds", "accumulation", "seeds", "keep", "parameters"), 1),
    **dict.fromkeys(("fragments", "warmup_local_steps"), 1),
    **dict.fromkeys(("warmup_steps", "train_eval_examples", "test_eval_examples"), 0),
    **dict.fromkeys(("eval_every", "switch_step", "checkpoint_every"), 0),
    **dict.fromkeys(("seed", "stream_workers", "delay_steps"), 0),
}
# The most of each, beyond which planning alone would take minutes or the memory of the machine.
MOST = {
    **{"steps": 10_000_000, "rounds": 1_000_000},
    **dict.fromkeys(("local_steps", "hub_period", "warmup_steps", "switch_step"), 2**31 - 1),
    "warmup_local_steps": 2**31 - 1,
    **dict.fromkeys(("eval_every", "checkpoint_every", "keep", "delay_steps"), 2**31 - 1),
    **dict.fromkeys(("train_eval_examples", "test_eval_examples"), 2**31 - 1),
    **{"workers": 1 << 20, "hubs": 512, "batch_size": 1 << 24, "accumulation": 1 << 24},
    **{"seeds": 1000, "stream_workers": 1024, "fragments": 1 << 20, "parameters": 10**12},
}
MOST_EXAMPLES = 1 << 26  # of all workers in a step
SHARES = ("mixing_factor", "error_decay")  # numbers from 0 to 1


def check_numbers(config: Config) -> None:
    """Check the ranges of numbers, and that the method uses the options that are given.

    Raises:
      ConfigurationError: the first flag that is wrong.
    """
    lookup("method", config.method, METHODS)
    _check_texts(config)
    _check_sizes(config)
    if config.batch_size % config.accumulation:
        raise ConfigurationError(
            f"--accumulation={config.accumulation} does not divide --batch_size={config.batch_size}"
        )
    lookup("model state option", config.model_state, dict.fromkeys(MODEL_STATES))
    mesh_shape(config)
    _check_rates(config)
    _check_recipe(config)
    _check_outer(config)
    _check_own_options(config)


def _check_texts(config: Config) -> None:
    """Check that every text fits on a line of flags.txt."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str) and not value.isprintable():
            raise ConfigurationError(
                f"--{field.name} must have printable characters only, got {value!r:.99}"
            )


def _check_sizes(config: Config) -> None:
    for name, bound in LEAST.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise ConfigurationError(f"--{name} must be at least {bound}, got {value}")
    for name, bound in MOST.items():
        value = getattr(config, name)
        if value is not None and value > bound:
            raise ConfigurationError(f"--{name} must be at most {bound}, got {value}")
    if config.seed + config.seeds > 1 << 32:
        raise ConfigurationError(f"--seed must be less than 2^32, got {config.seed}")
    if METHODS[config.method].network == "workers" and config.workers > MOST["hubs"]:
        raise ConfigurationError(
            f"in {config.method} every worker is a hub, and --workers={config.workers} is more "
            f"than {MOST['hubs']} hubs"
        )
    if config.workers * config.batch_size > MOST_EXAMPLES:
        raise ConfigurationError(
            f"--workers={config.workers} with --batch_size={config.batch_size} take "
            f"{config.workers * config.batch_size} examples in a step, more than {MOST_EXAMPLES}"
        )


def mesh_shape(config: Config) -> tuple[int, ...] | None:
    """Sizes of the mesh of `--mesh`: hubs, workers and, where it is given, model; else None."""
    if config.mesh is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,5}(x[1-9][0-9]{0,5}){1,2}", config.mesh):
        raise ConfigurationError(
            f"--mesh must be HUBSxWORKERS or HUBSxWORKERSxMODEL, such as 2x4 or 1x2x4, got "
            f"{config.mesh!r}"
        )
    return tuple(map(int, config.mesh.split("x")))


def _check_rates(config: Config) -> None:
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


def _check_recipe(config: Config) -> None:
    """Check gradient clipping, mixup, the factor of step decay, and lengths in epochs."""
    if not 0 < config.decay_factor < 1:
        raise ConfigurationError(f"--decay_factor must be in (0, 1), got {config.decay_factor}")
    if config.clip_norm is not None and not 0 < config.clip_norm < math.inf:
        raise ConfigurationError(f"--clip_norm must be a number > 0, got {config.clip_norm}")
    if config.epochs is not None and not 0 < config.epochs < math.inf:
        raise ConfigurationError(f"--epochs must be a number > 0, got {config.epochs}")
    if config.warmup_epochs is not None and not 0 <= config.warmup_epochs < math.inf:
        raise ConfigurationError(
            f"--warmup_epochs must be a number ≥ 0, got {config.warmup_epochs}"
        )
    if config.mixup and config.batch_size == config.accumulation:
        raise ConfigurationError(
            f"--mixup={config.mixup} mixes the examples of a batch, and --batch_size="
            f"{config.batch_size} with --accumulation={config.accumulation} has one at a time"
        )


def _check_outer(config: Config) -> None:
    given = [n for n in ("optimizer", "learning_rate", "momentum") if _outer(config, n) is not None]
    if given and not METHODS[config.method].outer_optimizer:
        name = given[0]
        others = ", ".join(name for name, spec in METHODS.items() if spec.outer_optimizer)
        raise ConfigurationError(
            f"--outer_{name}={_outer(config, name)} is for {others}; {config.method} has no outer "
            f"optimizer"
        )
    rate, beta = config.outer_learning_rate, config.outer_momentum
    if rate is not None and not 0 < rate < math.inf:
        raise ConfigurationError(f"--outer_learning_rate must be a number > 0, got {rate}")
    if beta is not None and not 0 <= beta < 1:
        raise ConfigurationError(f"--outer_momentum must be in [0, 1), got {beta}")


def _outer(config: Config, name: str) -> Any:
    return getattr(config, f"outer_{name}")


def _check_own_options(config: Config) -> None:
    """Check the options that only some methods have."""
    spec = METHODS[config.method]
    for name in sorted({name for other in METHODS.values() for name in other.own_options}):
        value = getattr(config, name)
        if value is not None and name not in spec.own_options:
            others = ", ".join(n for n, other in METHODS.items() if name in other.own_options)
            raise ConfigurationError(f"--{name}={value} is for {others}, not for {config.method}")
    for name in SHARES:
        share = getattr(config, name)
        if share is not None and not 0 <= share <= 1:
            raise ConfigurationError(f"--{name} must be in [0, 1], got {share}")
    if not spec.takes("optimizer_state") and config.optimizer_state != "keep":
        raise ConfigurationError(
            f"--optimizer_state={config.optimizer_state} is not for {config.method}, in which "
            f"every worker keeps its optimizer state"
        )
