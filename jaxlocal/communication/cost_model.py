"""The cost model of a run: hours of compute, of communication and of waiting for stragglers.

It is a model, not a measurement: communication overlaps with compute only in `overlap_steps`, and
links do not contend.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlocal.communication.collective_costs import Cluster, CollectiveRun
from jaxlocal.communication.stragglers import RoundSeconds
from jaxlocal.errors import ConfigurationError


class Hours(NamedTuple):
    """Hours of a run of the mean device, by what they are spent on."""

    compute: float
    communication: float
    waiting: float  # for slower devices

    @property
    def total(self) -> float:
        """The hours of the run."""
        return sum(self)


def hours(
    lengths: Iterable[int],
    cluster: Cluster,
    inner: Sequence[CollectiveRun] = (),
    outer: Sequence[CollectiveRun] = (),
    inner_steps: int = 1,
    overlap_steps: int = 0,
    end_steps: int = 0,
) -> Hours:
    """Predict the hours of a run on a cluster.

    The participants of a collective wait for the slowest. H steps of device i take a time that is
    about normal, with mean H t f_i and standard deviation √H · jitter · t f_i. K devices of equal
    speed therefore take, from one average to the next,

        H t + √H · jitter · t · E[maximum of K standard normals]

    so that one average of H steps waits less than H averages of one step; the time that a slow
    device takes longer is not averaged out. Where inner stages communicate, every hub waits for its
    slowest device, and the end of the round for the slowest hub. At the end all hubs wait for each
    other, also on a ring, where hubs in fact wait for their neighbours alone.

    A round's end that overlaps with τ steps costs the time that it takes longer than these steps.
    The steps are not counted against waiting, which is therefore an upper bound.

    Args:
      lengths: H of every round, in steps.
      cluster: the devices and their links.
      inner: the collectives of one inner stage, each (kind, bytes of the result on one device,
        participants), in groups of devices with successive numbers.
      outer: the collectives of the end of a round, at which all devices wait for each other.
      inner_steps: the steps of one inner stage.
      overlap_steps: τ, the last steps of a round, without inner stages.
      end_steps: steps of a round after its inner stages and before the collectives of its end.

    Returns:
      The hours of the mean device.

    Raises:
      ConfigurationError: fewer than one inner step, negative steps, or devices that do not divide
        into the groups of the inner collectives.

    >>> cluster = Cluster(8, 0, step_seconds=3.6, devices=2, jitter=0.1)
    >>> every_step = hours([100], cluster, inner=[("all-reduce", 1e9, 2)])
    >>> rarely = hours([25] * 4, cluster, outer=[("all-reduce", 1e9, 2)])
    >>> [round(part, 4) for part in every_step], [round(part, 4) for part in rarely]
    ([0.1, 0.0278, 0.0056], [0.1, 0.0011, 0.0011])
    """
    if inner_steps < 1 or min(overlap_steps, end_steps) < 0:
        raise ConfigurationError(
            f"an inner stage takes at least 1 step, an overlap and an end at least 0, got "
            f"{inner_steps}, {overlap_steps} and {end_steps}"
        )
    inner_seconds, outer_seconds = cluster.total_seconds(inner), cluster.total_seconds(outer)
    group = max((participants for *_, participants in inner), default=1)
    until_slowest = RoundSeconds(cluster, group, inner_steps, common_end=bool(outer))
    step, seconds = float(cluster.step.mean()), np.zeros(3)
    for length, times in Counter(lengths).items():
        compute, hidden = length * step, min(overlap_steps, length) * step
        stages = max(0, length - overlap_steps - end_steps) // inner_steps
        communication = stages * inner_seconds + max(0.0, outer_seconds - hidden)
        waiting = max(0.0, until_slowest(length) - compute)
        seconds += times * np.array([compute, communication, waiting])
    return Hours(*(float(part) / 3600 for part in seconds))
