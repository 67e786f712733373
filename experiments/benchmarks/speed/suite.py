"""Run the suite `speed`."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from experiments.benchmarks.machine_load import wait_until_idle
from experiments.benchmarks.speed.comparison import compare_contenders
from experiments.benchmarks.speed.contender import JAXLOCAL
from experiments.benchmarks.speed.growth import GROWTH, measure_growth
from experiments.benchmarks.speed.jax_contenders import method_of
from experiments.benchmarks.speed.tables import show_comparison, show_growth
from experiments.benchmarks.workloads import Workload


def run(
    workloads: Sequence[Workload],
    repeats: int,
    limit: float,
    worker_map: str | None,
    with_growth: bool,
    wait_idle: float,
    console: Console,
) -> dict[str, Any]:
    """Compare the contenders on each workload, and print each table when it is done.

    Args:
      workloads: what is trained.
      repeats: rounds of each contender that count.
      limit: seconds to wait for one round.
      worker_map: how a device runs jaxlocal's workers; by default the library's choice.
      with_growth: whether to measure time and memory with more workers too.
      wait_idle: seconds to wait for an idle machine.
      console: where tables are printed.

    Returns:
      The figures: "workloads", "worker_map", "growth" if asked for, "complete" if jaxlocal failed
      on none, "other_load_before" and "other_load_during".

    Raises:
      ConfigurationError: the worker map is unknown.
    """
    for workload in workloads:
        method_of(workload, worker_map)  # raises before anything is measured
    before, parts = wait_until_idle(wait_idle), []
    for workload in workloads:
        parts.append(compare_contenders(workload, repeats, limit, worker_map))
        show_comparison(parts[-1], console)
    figures: dict[str, Any] = {"workloads": list(parts), "worker_map": worker_map}
    if with_growth:
        figures["growth"] = {}
        for workload, workers in GROWTH.items():
            grown = measure_growth(workload, workers, repeats, limit, worker_map)
            show_growth(grown, console)
            figures["growth"][workload.name] = grown
            parts.append(grown)
    during = [part.pop("other_load") for part in parts]
    failures = [part["contenders"][JAXLOCAL]["failure"] for part in figures["workloads"]]
    load = {"other_load_before": before, "other_load_during": during}
    return {**figures, "complete": not any(failures), **load}
