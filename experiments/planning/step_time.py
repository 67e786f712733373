"""Measure the time of a worker's step on this machine."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.timing import interleaved_seconds, spread
from experiments.building.config import Config
from experiments.building.job import (
    Job,
    Plan,
    build_job,
    initial_state,
    make_round_fn,
    without_model,
)
from experiments.running.feeding import Feed

SIZES, REPEATS = (4, 16), 5  # steps of the two programs that are timed, and how often


def step_time(plan: Plan, given: float | None) -> dict[str, Any]:
    """Milliseconds of a worker's step: the given number, or measured here.

    Raises:
      ConfigurationError: a model that is not built cannot be measured.
    """
    if given is not None:
        return {"median": given, "measured_on": None}
    if not isinstance(plan, Job):
        raise without_model(plan.config, "its step cannot be measured; give --step_ms")
    device = jax.local_devices()[0]
    return {**spread(measure_steps(plan)), "measured_on": device.device_kind}


def measure_steps(job: Job) -> list[float]:
    """Milliseconds of a step of one worker of a job, alone on the first device of this machine.

    Every value is the difference of a program of many steps and one of few, without compilation.
    """
    job = build_job(_alone(job))
    with Feed(job) as feed:
        round_fn, batches = make_round_fn(job, feed.pool), {n: feed(0, n) for n in SIZES}
        state = initial_state(job, round_fn)

        def run_size(size: int) -> Any:
            nonlocal state
            state, _ = round_fn.local_steps(state, batches[size])
            return state.params

        programs = {str(size): functools.partial(run_size, size) for size in SIZES}
        seconds = interleaved_seconds(programs, REPEATS)
    few, many = (np.array(seconds[str(n)]) for n in SIZES)
    steps = (many - few) / (SIZES[1] - SIZES[0])
    return list(1e3 * (steps if np.median(steps) > 0 else many / SIZES[1]))


def _alone(job: Job) -> Config:
    """The config of one worker of a job that does not communicate."""
    kept = [
        field.name
        for field in dataclasses.fields(Config)
        if field.metadata["group"] in ("data", "model", "optimizer") and field.name != "partition"
    ]
    same = {name: getattr(job.config, name) for name in (*kept, "accumulation", "worker_map")}
    return Config(workers=1, period="constant", steps=max(job.steps, SIZES[1]), **same)
