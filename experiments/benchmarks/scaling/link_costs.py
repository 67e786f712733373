"""Time steps over a slow link, and compare them with the prediction of the cost model."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.scaling.group import GroupTimings, time_groups
from experiments.benchmarks.scaling.setups import (
    DATA_PARALLEL,
    LOCAL_STEPS,
    METHODS,
    OVER_LINK,
    Request,
    Setup,
)
from experiments.benchmarks.scaling.slow_link import Link
from experiments.benchmarks.scaling.speedups import failures
from experiments.benchmarks.timing import ratio_spread, spread
from experiments.benchmarks.workloads import Workload
from jaxlocal.communication.collective_costs import Cluster
from jaxlocal.communication.cost_model import hours


def measure_over_link(
    workload: Workload,
    repeats: int,
    limit: float,
    link: Link,
    setups: Sequence[Setup] = OVER_LINK,
    methods: Sequence[str] = METHODS,
) -> dict[str, Any]:
    """Time a step over a slow link and, in alternation, over the same link at full speed.

    Args:
      workload: what is trained.
      repeats: rounds of each method that count.
      limit: seconds to wait for one round.
      link: between the processes.
      setups: of processes.
      methods: names of the methods, local steps and data parallelism among them.

    Returns:
      "mbps", "ms" and "netem" of the link; "processes": by the title of a setup the figures of
      `link_rows`; "failures" by title; "other_load", see `time_groups`.
    """
    requests = {
        setup: [Request(m, workload.workers, slow) for slow in (False, True) for m in methods]
        for setup in setups
    }
    timings, load = time_groups(workload, requests, repeats, limit, link)
    rows = {
        setup.title: link_rows(group, setup, workload, link, methods)
        for setup, group in timings.items()
        if not group.failure
    }
    speed = {"mbps": link.mbps, "ms": link.ms, "netem": link.netem}
    return {**speed, "processes": rows, "failures": failures(timings), "other_load": load}


def link_rows(
    timings: GroupTimings,
    setup: Setup,
    workload: Workload,
    link: Link,
    methods: Sequence[str] = METHODS,
) -> dict[str, Any]:
    """Compare the measured seconds of a step with the predicted ones, for every method.

    The prediction knows the time of local steps and the speed of the link. Packing, gloo's own work
    and waiting are left out of it; this overhead is measured as what a step takes longer than a
    local step where the link is at full speed.

    Returns:
      By method the "seconds" of a step in each repeat, those "predicted", the "overhead" in
      seconds, and spreads of the ratio of the measured seconds to the predicted ones, without and
      with the overhead, and of the speed-up over data parallelism.
    """

    def seconds(method: str, slow: bool) -> np.ndarray:
        measured = timings.seconds[Request(method, workload.workers, slow)]
        return np.array(measured) / workload.steps

    median = lambda method, slow: float(np.median(seconds(method, slow)))
    local_step, baseline = median(LOCAL_STEPS, True), seconds(DATA_PARALLEL, True).tolist()
    rows = {}
    for method in methods:
        collectives = timings.collectives[Request(method, workload.workers, True)]
        predicted = predicted_seconds(
            local_step, collectives, workload.steps, setup.processes, link
        )
        overhead = max(0.0, median(method, False) - median(LOCAL_STEPS, False))
        rows[method] = _row(seconds(method, True).tolist(), predicted, overhead, baseline)
    return rows


def _row(
    seconds: list[float], predicted: float, overhead: float, data_parallel: list[float]
) -> dict[str, Any]:
    with_overhead = predicted + overhead
    return {
        "seconds": seconds,
        "predicted": predicted,
        "overhead": overhead,
        "ratio_to_predicted": spread([s / predicted for s in seconds]),
        "ratio_to_predicted_and_overhead": spread([s / with_overhead for s in seconds]),
        "speedup_over_data_parallel": ratio_spread(data_parallel, seconds),
    }


def predicted_seconds(
    step_seconds: float,
    collectives: Iterable[tuple[str, int, int, int]],
    steps: int,
    devices: int,
    link: Link,
) -> float:
    """Predict the seconds of a step by the cost model, with ring all-reduces as gloo runs them.

    Args:
      step_seconds: of a local step.
      collectives: of a round: kind, bytes, devices that take part, number of times.
      steps: of a round.
      devices: of the cluster.
      link: between the devices.
    """
    cluster = Cluster(link.mbps / 1e3, link.ms * 1e3, step_seconds, devices, all_reduce="ring")
    outer = [(kind, nbytes, n) for kind, nbytes, n, times in collectives for _ in range(times)]
    return 3600 * hours([steps], cluster, outer=outer).total / steps
