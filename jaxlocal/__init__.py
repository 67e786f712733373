"""jaxlocal: train one model on many workers that rarely talk."""

from jaxlocal import compression, mixing, periods, sharding, topology
from jaxlocal.compressed import csea, cser, cser_pl, ef_sgd, qsparse_local_sgd, sparse_loco
from jaxlocal.errors import ConfigurationError
from jaxlocal.gradient import accumulate, gradients
from jaxlocal.local import scale_by_tick
from jaxlocal.methods import (
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
from jaxlocal.placement import make_mesh
from jaxlocal.rounds import RoundFn
from jaxlocal.workers import Layout

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "Layout",
    "RoundFn",
    "accumulate",
    "compression",
    "cooperative_sgd",
    "csea",
    "cser",
    "cser_pl",
    "data_parallel",
    "diloco",
    "ef_sgd",
    "gradients",
    "hl_sgd",
    "local_sgd",
    "make_mesh",
    "mixing",
    "mll_sgd",
    "periods",
    "post_local_sgd",
    "qsparse_local_sgd",
    "scale_by_tick",
    "sharding",
    "slowmo",
    "sparse_loco",
    "streaming_diloco",
    "swap",
    "topology",
]
