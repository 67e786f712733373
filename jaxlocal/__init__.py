"""Communication-efficient distributed training in JAX: Local SGD and its relatives."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxlocal import communication, compression, parallel, periods, stages, training, types
from jaxlocal.communication import mixing, topology
from jaxlocal.errors import ConfigurationError
from jaxlocal.methods.averaging import (
    cooperative_sgd,
    data_parallel,
    diloco,
    hl_sgd,
    local_sgd,
    mll_sgd,
    post_local_sgd,
    slowmo,
    streaming_diloco,
    swap,
)
from jaxlocal.methods.compressed import csea, cser, cser_pl, ef_sgd, qsparse_local_sgd, sparse_loco
from jaxlocal.parallel import sharding
from jaxlocal.parallel.layout import Layout
from jaxlocal.parallel.mesh import make_mesh
from jaxlocal.stages.gradient import accumulate, gradients
from jaxlocal.stages.optimizers import scale_by_step
from jaxlocal.training import checkpoints, evaluation
from jaxlocal.training.round import RoundFn

if TYPE_CHECKING:
    from jaxlocal import data, models, nn

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "Layout",
    "RoundFn",
    "accumulate",
    "checkpoints",
    "communication",
    "compression",
    "cooperative_sgd",
    "csea",
    "cser",
    "cser_pl",
    "data",
    "data_parallel",
    "diloco",
    "ef_sgd",
    "evaluation",
    "gradients",
    "hl_sgd",
    "local_sgd",
    "make_mesh",
    "mixing",
    "mll_sgd",
    "models",
    "nn",
    "parallel",
    "periods",
    "post_local_sgd",
    "qsparse_local_sgd",
    "scale_by_step",
    "sharding",
    "slowmo",
    "sparse_loco",
    "stages",
    "streaming_diloco",
    "swap",
    "topology",
    "training",
    "types",
]

_LAZY = ("data", "models", "nn")  # what imports Flax, or reads data, is imported when it is used


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"jaxlocal.{name}")
    raise AttributeError(f"module 'jaxlocal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
