"""Communication-efficient distributed training in JAX: Local SGD and its relatives."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxlocal import (
    communication,
    compression,
    errors,
    methods,
    parallel,
    periods,
    stages,
    training,
    types,
)
from jaxlocal.communication import mixing, topology
from jaxlocal.errors import ConfigurationError
from jaxlocal.methods.table import *
from jaxlocal.parallel import sharding
from jaxlocal.parallel.layout import Layout
from jaxlocal.parallel.mesh import make_mesh
from jaxlocal.stages import accumulate, gradients, scale_by_step, scheduled
from jaxlocal.training import RoundFn, checkpoints, evaluation
from jaxlocal.types import Method

if TYPE_CHECKING:
    from jaxlocal import data, models, nn

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "Layout",
    "Method",
    "RoundFn",
    "accumulate",
    "checkpoints",
    "communication",
    "compression",
    "data",
    "errors",
    "evaluation",
    "gradients",
    "make_mesh",
    "methods",
    "mixing",
    "models",
    "nn",
    "parallel",
    "periods",
    "scale_by_step",
    "scheduled",
    "sharding",
    "stages",
    "topology",
    "training",
    "types",
]
__all__ += methods.table.__all__

_LAZY = ("data", "models", "nn")  # what imports Flax, or reads data, is imported when it is used


if not TYPE_CHECKING:  # to which the names above are known, and others are mistakes

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return importlib.import_module(f"jaxlocal.{name}")
        raise AttributeError(f"module 'jaxlocal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
