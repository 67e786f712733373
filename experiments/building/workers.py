"""From flags to the workers: their grid, weights and rates, and the network of hubs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.building.config import Config
from jaxlocal import ConfigurationError, Layout
from jaxlocal.communication import topology
from jaxlocal.errors import lookup
from jaxlocal.methods import METHODS

# The released rate distributions of the MLL-SGD experiments, for a hub of n workers.
RATES: dict[str, Callable[[int], list[float]]] = {
    "full": lambda n: [1.0] * n,
    "fixed": lambda n: [0.55] * n,
    "uniform": lambda n: [round((i + 1) / n, 12) for i in range(n)],
    "slow_one": lambda n: [0.1] + [0.6] * (n - 1),
    "fast_one": lambda n: [1.0] + [0.5] * (n - 1),
    "straggler": lambda n: [0.6] + [0.9] * (n - 1),
}


def worker_grid(config: Config) -> tuple[int, int]:
    """Number of hubs and of workers per hub.

    Raises:
      ConfigurationError: the method has no hubs, or the workers do not divide into them.
    """
    network = METHODS[config.method].network
    if network == "workers":
        if config.hubs not in (1, config.workers):
            raise ConfigurationError(
                f"in {config.method} every worker is a hub: {config.workers} workers, "
                f"--hubs={config.hubs}"
            )
        return config.workers, 1
    if config.hubs > 1 and network != "hubs":
        others = " or ".join(name for name, spec in METHODS.items() if spec.network == "hubs")
        raise ConfigurationError(
            f"{config.method} has no hubs, and --hubs={config.hubs} was given; use {others}"
        )
    if config.workers % config.hubs:
        raise ConfigurationError(f"{config.workers} workers do not divide into {config.hubs} hubs")
    return config.hubs, config.workers // config.hubs


def make_layout(config: Config, grid: tuple[int, int], shard_sizes: NDArray | None) -> Layout:
    """The workers with their weights and rates; with `--wait` they take all steps.

    Args:
      shard_sizes: [hubs, workers per hub], the examples that each worker holds; None without a
        dataset.

    Raises:
      ConfigurationError: weights or rates that do not fit the workers.
    """
    layout = Layout(*grid, weights=_weights(config, shard_sizes), rates=_rates(config, grid[1]))
    return dataclasses.replace(layout, rates=1.0) if config.wait else layout


def step_rates(config: Config, layout: Layout) -> NDArray:
    """The probability with which each worker takes a step in a time slot, [hubs, workers]."""
    return dataclasses.replace(layout, rates=_rates(config, layout.workers_per_hub)).rate


def _rates(config: Config, workers_per_hub: int) -> list[float] | float:
    per_hub = config.workers if METHODS[config.method].network == "workers" else workers_per_hub
    if config.rates[:1].isalpha():
        return lookup("rates", config.rates, RATES)(per_hub)
    return _numbers("rates", config.rates, tuple(RATES))


def _weights(config: Config, shard_sizes: NDArray | None) -> Any:
    if config.worker_weights == "uniform":
        return 1.0
    if config.worker_weights != "data":
        return _numbers("worker_weights", config.worker_weights, ("uniform", "data"))
    if shard_sizes is None:
        raise ConfigurationError(
            "--worker_weights=data needs a dataset, and --parameters plans without one"
        )
    return shard_sizes


def _numbers(name: str, text: str, names: tuple[str, ...]) -> list[float] | float:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(
            f"--{name}={text} is neither {', '.join(names)} nor numbers separated by commas"
        ) from None
    return values if len(values) > 1 else values[0]


def mixing_matrix(config: Config, layout: Layout) -> np.ndarray:
    """Mixing matrix of the hub network, [hubs, hubs]; [[1]] for methods without one.

    Raises:
      ConfigurationError: a hub graph that the method does not use, or one that is not connected.
    """
    spec = METHODS[config.method]
    if not spec.network:
        if config.hub_graph != "complete":
            raise ConfigurationError(
                f"{config.method} has no hub graph, and --hub_graph={config.hub_graph} was given"
            )
        return np.ones((1, 1))
    if not spec.takes("matrix") and config.hub_graph != "complete":
        raise ConfigurationError(
            f"{config.method} mixes all hubs with each other; --hub_graph={config.hub_graph} needs "
            f"mll_sgd"
        )
    graph = topology.hub_graph(config.hub_graph, layout.hubs, config.seed)
    return topology.mixing_matrix(graph, layout.hub_weight)
