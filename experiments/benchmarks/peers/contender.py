"""Run the rounds of jaxlocal or of a peer in this process, one for each line on the standard input.

    python -m experiments.benchmarks.peers.contender --contender=jax --workload=mll_cnn

The replies are those of `experiments.benchmarks.speed.contender`.
"""

from collections.abc import Callable
from importlib import import_module

from experiments.benchmarks.speed.contender import (
    CONTENDERS,
    JAXLOCAL,
    Contender,
    main,
    worker_grid,
)
from experiments.benchmarks.speed.jax_contenders import Rounds
from experiments.benchmarks.workloads import Workload
from jaxlocal.types import Tree


def _of(module: str, function: str) -> Callable[[Workload, Tree], Rounds]:
    """A function of a module of this package, imported when it is called."""

    def build(workload: Workload, params: Tree) -> Rounds:
        return getattr(import_module(f"{__package__}.{module}"), function)(workload, params)

    return build


def _torch(label: str, function: str) -> Contender:
    return Contender(label, _of("torch_processes", function), package="torch")


AVERAGES = ("local_sgd",)  # what federated averaging can run
PEERS = {
    JAXLOCAL: CONTENDERS[JAXLOCAL],
    "jax_1": Contender("plain JAX, one device", _of("plain_jax", "plain_rounds")),
    "jax": Contender("plain JAX, all devices", _of("plain_jax", "plain_rounds"), worker_grid),
    "jax_layers_1": Contender(
        "plain JAX with jaxlocal's layers, one device", _of("plain_jax", "library_layers_rounds")
    ),
    "jax_layers": Contender(
        "plain JAX with jaxlocal's layers, all devices",
        _of("plain_jax", "library_layers_rounds"),
        worker_grid,
    ),
    "drjax": Contender("DrJAX", _of("drjax_rounds", "drjax_rounds"), worker_grid, "drjax"),
    "fedjax": Contender("FedJAX", _of("fedjax_rounds", "fedjax_rounds"), None, "fedjax", AVERAGES),
    "torch": _torch("PyTorch, one process", "torch_rounds"),
    "torch_processes": _torch("PyTorch, a process for each core", "parallel_rounds"),
    "torch_compiled": _torch("PyTorch compiled, one process", "compiled_rounds"),
    "torch_compiled_processes": _torch(
        "PyTorch compiled, a process for each core", "parallel_compiled_rounds"
    ),
    "torchft": Contender(
        "torchft, a process for each worker",
        _of("torchft_rounds", "torchft_rounds"),
        package="torchft",
        methods=("diloco",),
    ),
    "flower": Contender(
        "Flower", _of("flower_rounds", "flower_rounds"), package="flwr", methods=AVERAGES
    ),
    "pfl": Contender("pfl-research", _of("pfl_rounds", "pfl_rounds"), None, "pfl", AVERAGES),
}

if __name__ == "__main__":
    main(PEERS)
