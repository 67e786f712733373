"""Measure how the time and the memory of a round grow with the number of workers."""

from collections.abc import Sequence
from typing import Any

from experiments.benchmarks.speed.comparison import contender_command
from experiments.benchmarks.speed.contender import JAXLOCAL
from experiments.benchmarks.speed.interleaved import time_interleaved
from experiments.benchmarks.speed.jax_contenders import program_bytes
from experiments.benchmarks.timing import ratio_spread
from experiments.benchmarks.workloads import WORKLOADS, Workload

GROWTH = {  # the numbers of workers of a workload
    WORKLOADS["mll_cnn"]._replace(steps=4): (2, 4, 8, 16, 32, 64),
    WORKLOADS["softmax"]._replace(batch_size=32): (8, 64, 256, 1024, 10_000),
}


def measure_growth(
    workload: Workload,
    workers: Sequence[int],
    repeats: int,
    limit: float,
    worker_map: str | None = None,
) -> dict[str, Any]:
    """Measure jaxlocal's time and memory with more and more workers.

    Args:
      workload: what each worker trains.
      workers: their numbers, in ascending order.
      repeats: rounds with each number of workers that count.
      limit: seconds to wait for one round.
      worker_map: how a device runs the workers; by default the library's choice.

    Returns:
      "title"; "workers": by their number the "failure" or None, the "seconds" of each round, the
      bytes of the program without its batches and the time per worker, the latter as the spread of
      its ratio to that with the fewest workers; "other_load": see `time_interleaved`.
    """
    sizes = {str(n): workload._replace(workers=n) for n in workers}
    commands = {n: contender_command(JAXLOCAL, w, worker_map) for n, w in sizes.items()}
    timings, load = time_interleaved(commands, repeats, limit)
    per_worker = {n: [s / int(n) for s in timings[n].seconds] for n in sizes}
    fewest = per_worker[str(workers[0])]
    rows: dict[str, Any] = {}
    for n, sized in sizes.items():
        rows[n] = {"failure": timings[n].failure, "seconds": timings[n].seconds}
        rows[n]["program_bytes"] = program_bytes(sized, worker_map)
        if per_worker[n] and fewest:
            rows[n]["time_per_worker"] = ratio_spread(per_worker[n], fewest)
    title = f"{workload.name} × {workload.batch_size} with more workers, {workload.steps} steps"
    return {"title": title, "workers": rows, "other_load": load}
