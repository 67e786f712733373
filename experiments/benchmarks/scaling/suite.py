"""The suite `scaling`: what more devices and processes gain, and what rounds take over a slow link
beside what the model of a cluster says."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.benchmarking import ratios_of, spread_of
from experiments.benchmarks.scaling.contender import LOCAL_STEPS
from experiments.benchmarks.scaling.group import Answers, Question, Setup, ask_in_turn
from experiments.benchmarks.scaling.link import Link
from experiments.benchmarks.speed.workloads import Workload
from experiments.launching.starting import cores
from jaxlocal.communication.collective_costs import Cluster
from jaxlocal.communication.cost_model import hours

WORKERS, STEPS, EXAMPLES = 8, 16, 2048  # in all; of a round; in the pool, whole on every device
DATA_PARALLEL = "data_parallel"
METHODS = (LOCAL_STEPS, "local_sgd", "cser", "qsparse_local_sgd", DATA_PARALLEL)
ALONE = Setup()
SETUPS = (*(Setup(devices=n) for n in (1, 2, 4, 8)), *(Setup(processes=n) for n in (2, 4)))
OVER_LINK = (Setup(processes=2), Setup(processes=4))


def sized(workload: Workload) -> Workload:
    """With workers that divide over all setups, and few examples: each device holds them all."""
    return workload._replace(workers=WORKERS, steps=STEPS, examples=EXAMPLES)


def scale(
    workload: Workload, repeats: int, limit: float, setups: Sequence[Setup] = SETUPS
) -> dict[str, Any]:
    """Seconds of a step on more and more devices: "strong", of the workload's workers; "weak", of
    one worker a device. The speed-up is in workers' steps a second, beside one device's."""
    sizes = {
        "strong": dict.fromkeys(setups, workload.workers),
        "weak": {setup: setup.total for setup in setups},
    }
    questions = {
        setup: [
            Question(method, workers)
            for workers in dict.fromkeys(sizes[kind][setup] for kind in sizes)
            for method in METHODS
        ]
        for setup in setups
    }
    said, others = ask_in_turn(workload, questions, repeats, limit)
    figures: dict[str, Any] = {
        kind: {s.title: _gain(s, workers, said, workload.steps) for s in said}
        for kind, workers in sizes.items()
    }
    return {**figures, "cores": cores(), "failures": _failures(said), "others": others}


def _gain(
    setup: Setup, workers: Mapping[Setup, int], said: Mapping[Setup, Answers], steps: int
) -> dict[str, Any]:
    """Of every method the seconds of a step and the speed-up."""
    row: dict[str, Any] = {"devices": setup.total, "workers": workers[setup], "methods": {}}
    if said[setup].failure or said[ALONE].failure:
        return row
    for method in METHODS:
        seconds = said[setup].seconds[Question(method, workers[setup])]
        alone = said[ALONE].seconds[Question(method, workers[ALONE])]
        more = workers[setup] / workers[ALONE]
        row["methods"][method] = {
            "seconds": [s / steps for s in seconds],
            "speedup": ratios_of([more * s for s in alone], to=seconds),
        }
    return row


def _failures(said: Mapping[Setup, Answers]) -> dict[str, str]:
    return {setup.title: answers.failure for setup, answers in said.items() if answers.failure}


def over_link(
    workload: Workload, repeats: int, limit: float, link: Link, setups: Sequence[Setup] = OVER_LINK
) -> dict[str, Any]:
    """Seconds of a step over a slow link and, in turn with them, over the same at full speed."""
    questions = {
        setup: [Question(m, workload.workers, slow) for slow in (False, True) for m in METHODS]
        for setup in setups
    }
    said, others = ask_in_turn(workload, questions, repeats, limit, link)
    rows = {
        setup.title: _beside(answers, setup, workload, link)
        for setup, answers in said.items()
        if not answers.failure
    }
    told = {"mbps": link.mbps, "ms": link.ms, "netem": link.netem}
    return {**told, "processes": rows, "failures": _failures(said), "others": others}


def _beside(answers: Answers, setup: Setup, workload: Workload, link: Link) -> dict[str, Any]:
    """Of every method the measured seconds of a step beside the model's.

    The model knows the step of local steps and the link. What it leaves out is the overhead: what a
    step takes longer than one of local steps where the link is at full speed, for packing, for
    gloo's own work and for waiting.
    """
    steps = workload.steps
    of = lambda method, slow: (
        np.array(answers.seconds[Question(method, workload.workers, slow)]) / steps
    )
    median = lambda method, slow: float(np.median(of(method, slow)))
    rows: dict[str, Any] = {}
    for method in METHODS:
        said = answers.collectives[Question(method, workload.workers, True)]
        seconds = of(method, True).tolist()
        model = predicted(median(LOCAL_STEPS, True), said, steps, setup.processes, link)
        overhead = max(0.0, median(method, False) - median(LOCAL_STEPS, False))
        rows[method] = {
            "seconds": seconds,
            "model": model,
            "overhead": overhead,
            "to_model": spread_of([s / model for s in seconds]),
            "to_model_and_overhead": spread_of([s / (model + overhead) for s in seconds]),
            "faster": ratios_of(of(DATA_PARALLEL, True).tolist(), to=seconds),
        }
    return rows


def predicted(
    step_seconds: float,
    collectives: Iterable[tuple[str, int, int, int]],
    steps: int,
    devices: int,
    link: Link,
) -> float:
    """Seconds of a step by the model of a cluster, of rounds of so many; gloo averages by a ring.

    Args:
      collectives: of a round: kind, bytes, devices that take part, how often.
    """
    cluster = Cluster(link.mbps / 1e3, link.ms * 1e3, step_seconds, devices, all_reduce="ring")
    said = [(kind, nbytes, n) for kind, nbytes, n, times in collectives for _ in range(times)]
    return 3600 * hours([steps], cluster, outer=said).total / steps
