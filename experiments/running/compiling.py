"""Compile the programs of a run in threads, while the run starts."""

from experiments.building.job import Job, measure_every
from experiments.running.feeding import Feed
from experiments.running.measuring import Measure
from jaxlocal import RoundFn
from jaxlocal.training.ahead import Ahead
from jaxlocal.training.common_state import full_shapes
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
    calls: dict[tuple[int, bool, bool], None] = {}
    begins = True  # whether the dispatch is the first of its round
    for _, steps, length, ends_round, _ in dispatches(round_fn, job.steps, measure_every(job)):
        if steps == length and ends_round and round_fn.is_measured(job.state, steps):
            calls[steps, True, True] = None
        else:
            calls[0 if ends_round and ends else steps, False, begins] = None
            calls |= {(0, True, False): None} if ends_round else {}
        begins = ends_round
    within = full_shapes(job.state)
    for steps, is_end, at_start in calls:
        state = job.state if at_start else within
        round_fn.compile_ahead(state, batches, steps, is_end, ahead)
