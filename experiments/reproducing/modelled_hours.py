"""Axes of modelled time: the hours after which a run would be at a step on a cluster."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from experiments.building.config import Config
from experiments.building.job import Plan, build_plan
from experiments.planning.cluster import on_cluster
from experiments.planning.options import Options

Clock = Callable[[int], float]  # hours by step


def clocks(config: Config, clusters: dict[str, dict[str, Any]]) -> dict[str, Clock]:
    """The clock of a run for each axis of modelled time.

    Args:
      clusters: by axis, the number of parameters of the model whose messages are sent, and
        options of `experiments.planning`.

    Raises:
      ConfigurationError: options that do not fit the run.
    """
    if not clusters:
        return {}
    steps = build_plan(config).in_steps
    return {axis: _clock(steps, dict(cluster)) for axis, cluster in clusters.items()}


def _clock(config: Config, cluster: dict[str, Any]) -> Clock:
    """The hours of the rounds before a step, and of its share of the round that it is in."""
    sized = dataclasses.replace(config, parameters=cluster.pop("parameters"))
    plan, options = build_plan(sized), Options(**cluster)
    ends = [0, *itertools.accumulate(plan.lengths)]
    hours(plan, 1, options)  # mistakes are told before the first run

    def clock(step: int) -> float:
        begun = sum(end < step for end in ends)
        if not begun:
            return 0.0
        before = hours(plan, begun - 1, options)
        share = (step - ends[begun - 1]) / plan.lengths[begun - 1]
        return before + share * (hours(plan, begun, options) - before)

    return clock


def hours(plan: Plan, rounds: int, options: Options) -> float:
    """The hours of the first rounds of a plan."""
    lengths = plan.lengths[:rounds]
    first = dataclasses.replace(plan, lengths=lengths, steps=sum(lengths))
    return on_cluster(first, options)["planned"]["total_hours"] if rounds else 0.0
