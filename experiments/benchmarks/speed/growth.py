"""Measure how the time and the memory of a round grow with the number of workers."""

from typing import Any

from experiments.benchmarks.speed.comparison import contender_command
from experiments.benchmarks.speed.contender import JAXLOCAL
from experiments.benchmarks.speed.interleaved import time_interleaved
from experiments.benchmarks.speed.jax_contenders import program_bytes
from experiments.benchmarks.timing import ratio_spread
from experiments.benchmarks.workloads import WORKLOADS

WORKERS = (2, 4, 8, 16, 32, 64)
WORKLOAD = WORKLOADS["mll_cnn"]._replace(steps=4)


def measure_growth(repeats: int, limit: float, worker_map: str | None = None) -> dict[str, Any]:
    """Measure jaxlocal's time and memory with more and more workers.

    Args:
      repeats: rounds with each number of workers that count.
      limit: seconds to wait for one round.
      worker_map: how a device runs the workers; by default the library's choice.

    Returns:
      "workers": by their number the "failure" or None, the "seconds" of each round, the bytes of
      the program and the time per worker, the latter as the spread of its ratio to that with the
      fewest workers; "other_load": see `time_interleaved`.
    """
    sizes = {str(n): WORKLOAD._replace(workers=n) for n in WORKERS}
    commands = {n: contender_command(JAXLOCAL, w, worker_map) for n, w in sizes.items()}
    timings, load = time_interleaved(commands, repeats, limit)
    per_worker = {n: [s / int(n) for s in timings[n].seconds] for n in sizes}
    fewest = per_worker[str(WORKERS[0])]
    rows: dict[str, Any] = {}
    for n, workload in sizes.items():
        rows[n] = {"failure": timings[n].failure, "seconds": timings[n].seconds}
        rows[n]["program_bytes_per_worker"] = program_bytes(workload, worker_map) / int(n)
        if per_worker[n] and fewest:
            rows[n]["time_per_worker"] = ratio_spread(per_worker[n], fewest)
    return {"workers": rows, "other_load": load}
