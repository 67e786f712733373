"""Measure how much faster workers step on more devices and processes."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmarks.scaling.group import GroupTimings, time_groups
from experiments.benchmarks.scaling.setups import ALONE, METHODS, SETUPS, Request, Setup
from experiments.benchmarks.timing import ratio_spread
from experiments.benchmarks.workloads import Workload
from experiments.launching.starting import cores


def measure_speedups(
    workload: Workload,
    repeats: int,
    limit: float,
    setups: Sequence[Setup] = SETUPS,
    methods: Sequence[str] = METHODS,
) -> dict[str, Any]:
    """Time a step on more and more devices.

    Strong scaling keeps the workload's workers; weak scaling has one worker per device. The
    speed-up compares workers' steps a second with those of one device.

    Args:
      workload: what is trained.
      repeats: rounds of each method that count.
      limit: seconds to wait for one round.
      setups: of devices and processes; the first is a single device.
      methods: names of the methods.

    Returns:
      "strong" and "weak": by the title of a setup its "devices", "workers" and "methods", by name
      the "seconds" of a step and the spread of the "speedup"; "cores" of the machine; "failures" by
      title; "other_load", see `time_groups`.
    """
    workers = {
        "strong": dict.fromkeys(setups, workload.workers),
        "weak": {setup: setup.total for setup in setups},
    }
    requests = {s: _requests([counts[s] for counts in workers.values()], methods) for s in setups}
    timings, load = time_groups(workload, requests, repeats, limit)
    figures: dict[str, Any] = {
        kind: {s.title: speedup_row(s, counts, timings, workload.steps, methods) for s in timings}
        for kind, counts in workers.items()
    }
    failed = failures(timings)
    return {**figures, "cores": cores(), "failures": failed, "other_load": load}


def _requests(counts: Sequence[int], methods: Sequence[str]) -> list[Request]:
    """A round of every method with each number of workers."""
    return [Request(method, count) for count in dict.fromkeys(counts) for method in methods]


def speedup_row(
    setup: Setup,
    workers: Mapping[Setup, int],
    timings: Mapping[Setup, GroupTimings],
    steps: int,
    methods: Sequence[str] = METHODS,
) -> dict[str, Any]:
    """The figures of one setup: of every method the seconds of a step and the speed-up.

    Args:
      setup: whose figures.
      workers: their number, by setup.
      timings: of this setup and of the single device.
      steps: of a round.
      methods: names of the methods.
    """
    row: dict[str, Any] = {"devices": setup.total, "workers": workers[setup], "methods": {}}
    if timings[setup].failure or timings[ALONE].failure:
        return row
    for method in methods:
        seconds = timings[setup].seconds[Request(method, workers[setup])]
        alone = timings[ALONE].seconds[Request(method, workers[ALONE])]
        factor = workers[setup] / workers[ALONE]
        row["methods"][method] = {
            "seconds": [s / steps for s in seconds],
            "speedup": ratio_spread([factor * s for s in alone], seconds),
        }
    return row


def failures(timings: Mapping[Setup, GroupTimings]) -> dict[str, str]:
    """Why groups failed, by the title of their setup."""
    return {setup.title: group.failure for setup, group in timings.items() if group.failure}
