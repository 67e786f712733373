"""The time slots of a run: one a step, or with `--wait` as many as the slowest worker needs."""

from collections.abc import Callable

import jax

from experiments.building.job import Plan
from experiments.building.workers import mixing_matrix, step_rates
from jaxlocal.communication.time_slots import TimeSlots


def make_time_slots(plan: Plan) -> Callable[[int], int]:
    """Count the time slots until a step of the run, by the rates of the workers.

    With `--wait` the slots are drawn from the run's seed; a run that is resumed counts the same.
    """
    if not plan.config.wait:
        return lambda step: step
    sent = [message.payload for message in plan.method.inner.communication(plan.state)]
    return TimeSlots(
        step_rates(plan.config, plan.layout),
        plan.lengths,
        inner_steps=plan.method.inner.steps,
        hubs_wait=bool(jax.tree.leaves(sent)),
        links=mixing_matrix(plan.config, plan.layout) > 0,
        seed=plan.config.seed,
    )
