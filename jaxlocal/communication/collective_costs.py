"""Seconds of a collective on a cluster: latency, bandwidth, and the algorithm of an all-reduce.

This is a model, not a measurement: every device has one link, and links do not contend.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlocal.errors import ConfigurationError, lookup

# One run of a collective: its kind, the bytes of its result on one device, devices in a group.
CollectiveRun = tuple[str, float, int]


class Cost(NamedTuple):
    """Cost of a collective whose result has b bytes."""

    messages: int  # one after another
    volume: float  # bytes through the busiest link in one direction, as a multiple of b


class Algorithm(NamedTuple):
    """Costs of the collectives of an algorithm, as functions of the number n ≥ 2 of devices."""

    all_reduce: Callable[[int], Cost]
    all_gather: Callable[[int], Cost]


def _halving_doubling(n: int) -> Cost:
    """The largest power of two of devices average; each of the others sends its values to one of
    them before, and receives the result after."""
    log, rest = n.bit_length() - 1, n & (n - 1) > 0
    return Cost(2 * log + 2 * rest, 2 * (1 - 2.0**-log) + 2 * rest)


ALL_REDUCE = {
    "ring": Algorithm(
        lambda n: Cost(2 * (n - 1), 2 * (n - 1) / n), lambda n: Cost(n - 1, (n - 1) / n)
    ),
    "halving_doubling": Algorithm(
        _halving_doubling, lambda n: Cost((n - 1).bit_length(), (n - 1) / n)
    ),
    "server": Algorithm(lambda n: Cost(2, 2 * n), lambda n: Cost(2, n)),
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A cluster of devices, each with one full-duplex link to the others.

    A collective whose result has b bytes takes, on n devices, this number of seconds:

        messages · latency + volume · b / bandwidth

    | all_reduce         | all-reduce: messages, volume | all-gather: messages, volume |
    |--------------------|------------------------------|------------------------------|
    | "ring"             | 2 (n − 1), 2 (n − 1)/n       | n − 1, (n − 1)/n             |
    | "halving_doubling" | 2 log₂ n, 2 (n − 1)/n        | ⌈log₂ n⌉, (n − 1)/n          |
    | "server"           | 2, 2 n                       | 2, n                         |

    For n that is not a power of two, halving and doubling costs 2 messages of b more than for the
    next lower power. A server is one more device with one such link, which carries all messages. A
    collective-permute is one message of b.

    The steps of device i take f_i · t seconds on average. They are independent and normal, with a
    standard deviation of jitter · f_i · t.

    Args:
      bandwidth_gbps: bandwidth of a link in each direction, 10⁹ bits per second.
      latency_us: latency of a message, 10⁻⁶ seconds.
      step_seconds: t, the seconds of one step of all workers of a device.
      devices: the number of devices.
      all_reduce: "ring", "halving_doubling" or "server".
      jitter: the coefficient of variation of a device's steps.
      slowdown: f_i of the first devices; it is 1 for the others.

    Raises:
      ConfigurationError: a number that is not finite or not positive (jitter and latency may be
        0), a jitter above 1, more slowdowns than devices, or an unknown algorithm.

    >>> cluster = Cluster(bandwidth_gbps=10, latency_us=50, step_seconds=0.2, devices=4)
    >>> round(cluster.seconds("all-reduce", 1e9, 4), 6)  # 6 × 50 µs + 1.5 GB at 1.25 GB/s
    1.2003

    Source: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in
    MPICH", International Journal of High Performance Computing Applications 19(1), 2005.
    """

    bandwidth_gbps: float
    latency_us: float
    step_seconds: float
    devices: int
    all_reduce: str = "ring"
    jitter: float = 0.0
    slowdown: Sequence[float] = ()

    def __post_init__(self):
        lookup("all-reduce", self.all_reduce, ALL_REDUCE)
        positive = {
            "bandwidth in Gbit/s": self.bandwidth_gbps,
            "step in seconds": self.step_seconds,
            "number of devices": self.devices,
            **{f"slowdown of device {i}": factor for i, factor in enumerate(self.slowdown)},
        }
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ConfigurationError(f"the {name} must be a number > 0, got {value}")
        if not 0 <= self.latency_us < math.inf:
            raise ConfigurationError(
                f"the latency in µs must be a number ≥ 0, got {self.latency_us}"
            )
        if not 0 <= self.jitter <= 1:
            raise ConfigurationError(f"the jitter must be in [0, 1], got {self.jitter}")
        if len(self.slowdown) > self.devices:
            raise ConfigurationError(
                f"{len(self.slowdown)} slowdowns do not fit a cluster of {self.devices} devices"
            )

    @functools.cached_property
    def step(self) -> np.ndarray:
        """t f_i, the mean seconds of a step of each device, float64 [devices]."""
        factors = [*self.slowdown, *[1.0] * (self.devices - len(self.slowdown))]
        return self.step_seconds * np.array(factors)

    def seconds(self, kind: str, nbytes: float, participants: int) -> float:
        """Seconds that a collective takes in groups of devices.

        Args:
          kind: "all-reduce", "all-gather" or "collective-permute".
          nbytes: the bytes of its result on one device.
          participants: n, the number of devices in a group; a single device sends nothing.

        Returns:
          The seconds; 0 for a single device.

        Raises:
          ConfigurationError: an unknown kind, or more participants than devices.
        """
        algorithm = ALL_REDUCE[self.all_reduce]
        costs: dict[str, Callable[[int], Cost]] = {
            "all-reduce": algorithm.all_reduce,
            "all-gather": algorithm.all_gather,
            "collective-permute": lambda n: Cost(1, 1.0),
        }
        cost = lookup("collective", kind, costs)
        if not 1 <= participants <= self.devices:
            raise ConfigurationError(
                f"a collective of {participants} devices does not fit a cluster of {self.devices}"
            )
        if participants == 1:
            return 0.0
        messages, volume = cost(participants)
        return messages * self.latency_us * 1e-6 + volume * nbytes * 8e-9 / self.bandwidth_gbps

    def total_seconds(self, collectives: Iterable[CollectiveRun]) -> float:
        """Seconds that collectives take one after another."""
        return sum(self.seconds(*collective) for collective in collectives)
