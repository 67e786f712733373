"""From flags to a method: what each is handed of what the flags made."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax

import jaxlocal
from experiments.building.config import Config
from experiments.building.schedules import (
    count_steps,
    make_outer_optimizer,
    make_schedule,
    streaming_options,
)
from jaxlocal import Layout
from jaxlocal.stages.gradient import GradFn
from jaxlocal.types import Compressor, Method, Period


class Parts(NamedTuple):
    """What methods are made of."""

    config: Config
    grad_fn: GradFn
    optimizer: optax.GradientTransformation
    layout: Layout
    period: Period
    matrix: np.ndarray  # H of the hub network
    compressors: dict[str, Compressor]  # see `compressing.make_compressors`

    @property
    def own(self) -> tuple[GradFn, optax.GradientTransformation]:
        """What a worker runs by itself."""
        return self.grad_fn, self.optimizer

    @property
    def options(self) -> dict[str, Any]:
        synced = "average" if self.config.model_state == "average" else "keep"
        return {"worker_map": self.config.worker_map, "model_state": synced}

    @property
    def kept(self) -> dict[str, Any]:
        """The options, where averages may do something to optimizer states too."""
        return self.options | {"optimizer_state": self.config.optimizer_state}

    @property
    def hubs(self) -> dict[str, Any]:
        return self.kept | {"compressor": self.compressors.get("sync")}


def _local_sgd(p: Parts) -> Method:
    return jaxlocal.local_sgd(*p.own, p.period, **p.kept)


def _slowmo(p: Parts) -> Method:
    rate = make_schedule(p.config, count_steps(p.config))
    return jaxlocal.slowmo(*p.own, rate, p.period, make_outer_optimizer(p.config), **p.kept)


def _cser(p: Parts) -> Method:
    compressors = p.compressors["gradient"], p.compressors["reset"]
    which = 1 if p.config.cser_implementation is None else p.config.cser_implementation
    return jaxlocal.cser(*p.own, *compressors, p.period, which, **p.options)


def _sparse_loco(p: Parts) -> Method:
    decay = p.config.error_decay
    options = p.kept if decay is None else p.kept | {"error_decay": decay}
    outer = make_outer_optimizer(p.config)
    return jaxlocal.sparse_loco(*p.own, p.compressors["sync"], p.period, outer, **options)


def _streaming_diloco(p: Parts) -> Method:
    options = p.options | streaming_options(p.config)
    return jaxlocal.streaming_diloco(*p.own, p.period, make_outer_optimizer(p.config), **options)


METHODS: dict[str, Callable[[Parts], Method]] = {
    "data_parallel": lambda p: jaxlocal.data_parallel(
        *p.own, compressor=p.compressors.get("gradient"), **p.options
    ),
    "local_sgd": _local_sgd,
    "post_local_sgd": _local_sgd,
    "swap": _local_sgd,
    "mll_sgd": lambda p: jaxlocal.mll_sgd(
        *p.own, p.matrix, p.config.local_steps, p.period, **p.hubs
    ),
    "hl_sgd": lambda p: jaxlocal.hl_sgd(*p.own, p.layout, p.config.local_steps, p.period, **p.hubs),
    "cooperative_sgd": lambda p: jaxlocal.cooperative_sgd(*p.own, p.matrix, p.period, **p.kept),
    "slowmo": _slowmo,
    "diloco": lambda p: jaxlocal.diloco(*p.own, p.period, make_outer_optimizer(p.config), **p.kept),
    "streaming_diloco": _streaming_diloco,
    "ef_sgd": lambda p: jaxlocal.ef_sgd(*p.own, p.compressors["gradient"], **p.options),
    "qsparse_local_sgd": lambda p: jaxlocal.qsparse_local_sgd(
        *p.own, p.compressors["sync"], p.period, **p.kept
    ),
    "cser": _cser,
    "csea": lambda p: jaxlocal.csea(*p.own, p.compressors["reset"], **p.options),
    "cser_pl": lambda p: jaxlocal.cser_pl(*p.own, p.compressors["reset"], p.period, **p.options),
    "sparse_loco": _sparse_loco,
}
