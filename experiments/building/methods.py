"""From flags to a method: its arguments are found by the names in its signature."""

import inspect
from typing import Any, NamedTuple

import numpy as np
import optax

from experiments.building.config import Config
from experiments.building.optimizers import make_decay_optimizer, make_outer_optimizer
from experiments.building.schedules import switch_step
from jaxlocal import Layout
from jaxlocal.methods import METHODS
from jaxlocal.stages import GradFn
from jaxlocal.types import Compressor, Method, Period


class Parts(NamedTuple):
    """What the flags specify, from which every method takes its arguments."""

    config: Config
    grad_fn: GradFn
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule  # η by step
    layout: Layout
    steps: int  # of the run
    period: Period
    matrix: np.ndarray  # H of the hub network
    compressors: dict[str, Compressor]  # as of `make_compressors`


def build_method(parts: Parts) -> Method:
    """Build the method of the flags."""
    spec = METHODS[parts.config.method]
    wanted = inspect.signature(spec.build).parameters
    given = {**_common(parts), **_compressors(parts), **_own(parts)}
    return spec.build(parts.grad_fn, parts.optimizer, **{n: given[n] for n in wanted if n in given})


def _common(parts: Parts) -> dict[str, Any]:
    """The arguments that several methods have, by name."""
    config = parts.config
    return {
        "period": parts.period,
        "hub_period": parts.period,
        "local_steps": config.local_steps,
        "switch_step": switch_step(config, parts.steps),
        "matrix": parts.matrix,
        "layout": parts.layout,
        "learning_rate": parts.schedule,
        "outer_optimizer": make_outer_optimizer(config),
        "decay_optimizer": make_decay_optimizer(config, parts.schedule),
        "optimizer_state": config.optimizer_state,
        "model_state": "average" if config.model_state == "average" else "keep",
        "worker_map": config.worker_map,
    }


def _compressors(parts: Parts) -> dict[str, Any]:
    """The compressors by argument: `gradient_compressor` or another kind, or `compressor` alone."""
    given = {f"{what}_compressor": c for what, c in parts.compressors.items()}
    return given | dict.fromkeys(["compressor"], next(iter(given.values()), None))


def _own(parts: Parts) -> dict[str, Any]:
    """The arguments that only this method has, for the flags that are given."""
    options = METHODS[parts.config.method].own_options
    values = {argument: getattr(parts.config, flag) for flag, argument in options.items()}
    return {argument: value for argument, value in values.items() if value is not None}
