"""jaxlocal: train one model on many workers that rarely talk."""

from jaxlocal import mixing, periods, topology
from jaxlocal.errors import ConfigurationError
from jaxlocal.local import accumulate, gradients, scale_by_tick
from jaxlocal.methods import (
    cooperative_sgd,
    data_parallel,
    diloco,
    hl_sgd,
    local_sgd,
    mll_sgd,
    post_local_sgd,
    slowmo,
    swap,
)
from jaxlocal.rounds import RoundFn
from jaxlocal.workers import Layout, make_mesh

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "Layout",
    "RoundFn",
    "accumulate",
    "cooperative_sgd",
    "data_parallel",
    "diloco",
    "gradients",
    "hl_sgd",
    "local_sgd",
    "make_mesh",
    "mixing",
    "mll_sgd",
    "periods",
    "post_local_sgd",
    "scale_by_tick",
    "slowmo",
    "swap",
    "topology",
]
