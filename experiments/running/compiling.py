"""Compile the programs of a run in threads, while the run starts."""

from experiments.building.job import Job, measure_every
from experiments.running.feeding import Feed
from experiments.running.measuring import Measure
from jaxlocal import RoundFn
from jaxlocal.training.ahead import Ahead
from jaxlocal.training.dispatching import dispatches


def compile_ahead(job: Job, round_fn: RoundFn, feed: Feed, measure: Measure, ahead: Ahead) -> None:
    """Compile the programs of a run from its first step on, in the order in which it calls them.

    Not of a stream, which would be read for their shapes, and not of several processes.
    """
    if job.config.stream or round_fn.mesh.is_multi_process:
        return
    measure.compile_ahead(job.state, ahead)
    batches = feed(0, round_fn.method.inner.steps)
    ends = round_fn.method.outer.steps  # steps at the end of a round, which are a call of their own
    calls = dict.fromkeys(
        call
        for dispatch in dispatches(round_fn, job.steps, measure_every(job))
        for call in (
            (0 if dispatch.ends_round and ends else dispatch.steps, False),
            (0, dispatch.ends_round),
        )
    )
    for steps, is_end in calls:
        round_fn.compile_ahead(job.state, batches, steps, is_end, ahead)
