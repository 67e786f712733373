"""What no later piece checks of a config: the ranges of its numbers, and what goes together."""

import math
import re
from typing import Any

from experiments.building.config import Config
from experiments.building.methods import METHODS
from experiments.building.schedules import OUTER_DEFAULTS, STREAMING_DEFAULTS
from jaxlocal import ConfigurationError
from jaxlocal.errors import lookup

MODEL_STATES = ("keep", "average", "reestimate")
# Methods at whose averages optimizer states may not be averaged or reset.
OWN_OPTIMIZERS = ("ef_sgd", "cser", "csea", "cser_pl", "streaming_diloco")
LEAST = {
    **dict.fromkeys(("workers", "hubs", "local_steps", "hub_period", "batch_size"), 1),
    **dict.fromkeys(("steps", "rounds", "accumulation", "seeds", "keep", "parameters"), 1),
    "fragments": 1,
    **dict.fromkeys(("warmup_steps", "train_eval_examples", "test_eval_examples"), 0),
    **dict.fromkeys(("eval_every", "switch_step", "checkpoint_every"), 0),
    **dict.fromkeys(("seed", "stream_workers", "delay_steps"), 0),
}


def check_numbers(config: Config) -> None:
    """Ranges that no later piece checks, and options that the method has no use for."""
    lookup("method", config.method, METHODS)
    if config.seed + config.seeds > 1 << 32:
        raise ConfigurationError(f"--seed must be less than 2^32, got {config.seed}")
    for name, bound in LEAST.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise ConfigurationError(f"--{name} must be at least {bound}, got {value}")
    if config.batch_size % config.accumulation:
        raise ConfigurationError(
            f"--accumulation={config.accumulation} does not divide --batch_size={config.batch_size}"
        )
    lookup("model state option", config.model_state, dict.fromkeys(MODEL_STATES))
    mesh_shape(config)
    _check_rates(config)
    _check_outer(config)
    _check_streaming(config)
    _check_compression(config)


def mesh_shape(config: Config) -> tuple[int, ...] | None:
    """The sizes that --mesh asks for."""
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


def _check_outer(config: Config) -> None:
    given = [n for n in ("optimizer", "learning_rate", "momentum") if _outer(config, n) is not None]
    if given and config.method not in OUTER_DEFAULTS:
        name = given[0]
        raise ConfigurationError(
            f"--outer_{name}={_outer(config, name)} is for {', '.join(OUTER_DEFAULTS)}; "
            f"{config.method} has no outer optimizer"
        )
    rate, beta = config.outer_learning_rate, config.outer_momentum
    if rate is not None and not 0 < rate < math.inf:
        raise ConfigurationError(f"--outer_learning_rate must be a number > 0, got {rate}")
    if beta is not None and not 0 <= beta < 1:
        raise ConfigurationError(f"--outer_momentum must be in [0, 1), got {beta}")


def _outer(config: Config, name: str) -> Any:
    return getattr(config, f"outer_{name}")


def _check_streaming(config: Config) -> None:
    for name in STREAMING_DEFAULTS:
        value = getattr(config, name)
        if value is not None and config.method != "streaming_diloco":
            raise ConfigurationError(
                f"--{name}={value} is for streaming_diloco, not for {config.method}"
            )
    factor = config.mixing_factor
    if factor is not None and not 0 <= factor < 1:
        raise ConfigurationError(f"--mixing_factor must be in [0, 1), got {factor}")


def _check_compression(config: Config) -> None:
    for name, method in {"cser_implementation": "cser", "error_decay": "sparse_loco"}.items():
        value = getattr(config, name)
        if value is not None and config.method != method:
            raise ConfigurationError(f"--{name}={value} is for {method}, not for {config.method}")
    if config.cser_implementation not in (None, 1, 2):
        raise ConfigurationError(
            f"--cser_implementation must be 1 or 2, got {config.cser_implementation}"
        )
    decay = config.error_decay
    if decay is not None and not 0 <= decay <= 1:
        raise ConfigurationError(f"--error_decay must be in [0, 1], got {decay}")
    if config.method in OWN_OPTIMIZERS and config.optimizer_state != "keep":
        raise ConfigurationError(
            f"--optimizer_state={config.optimizer_state} is not for {config.method}, in which "
            f"every worker keeps its own"
        )
