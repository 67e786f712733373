"""The time of a run on a cluster: what links, the algorithm of an all-reduce and stragglers make
of its rounds.

A model and no measurement: one link a device, no contention between links, and nothing overlaps
but what is said to.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlocal.errors import ConfigurationError, lookup

Collective = tuple[str, float, int]  # kind, bytes of its result on one device, devices in a group


class Cost(NamedTuple):
    """Of a collective whose result has b bytes."""

    messages: int  # one after another
    volume: float  # of b, through the busiest link, one way


class Algorithm(NamedTuple):
    """How devices bring together what they hold: what it costs n of them, n ≥ 2."""

    all_reduce: Callable[[int], Cost]
    all_gather: Callable[[int], Cost]


def _halving_doubling(n: int) -> Cost:
    """Among the largest power of two; what the others have is added before and told after."""
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
    """Devices, each with one link to the others, that carries both ways at once.

    A collective whose result has b bytes takes, on n devices, seconds of

        messages · latency + volume · b / bandwidth

    | all_reduce         | all-reduce: messages, volume | all-gather: messages, volume |
    |--------------------|------------------------------|------------------------------|
    | "ring"             | 2 (n − 1), 2 (n − 1)/n       | n − 1, (n − 1)/n             |
    | "halving_doubling" | 2 log₂ n, 2 (n − 1)/n        | ⌈log₂ n⌉, (n − 1)/n          |
    | "server"           | 2, 2 n                       | 2, n                         |

    Halving and doubling of n that is no power of two adds 2 messages of b to those of the next
    lower one. A server has one such link too, through which all comes and goes. A
    collective-permute is one message of b.

    The steps of device i take f_i · t on average and are independent and normal with a standard
    deviation of jitter · f_i · t.

    Args:
      bandwidth_gbps: of a link each way, 10⁹ bits a second.
      latency_us: of a message, 10⁻⁶ seconds.
      step_seconds: t, of the workers that a device runs.
      devices: how many.
      all_reduce: "ring", "halving_doubling" or "server".
      jitter: the coefficient of variation of a device's steps.
      slowdown: f_i of the first devices; of the others it is 1.

    Raises:
      ConfigurationError: a number that is not finite or not positive (jitter and latency may be
        0), a jitter above 1, more slowdowns than devices, an unknown algorithm.

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
        """t f_i, the mean seconds of a step of every device, float64 [devices]."""
        factors = [*self.slowdown, *[1.0] * (self.devices - len(self.slowdown))]
        return self.step_seconds * np.array(factors)

    def seconds(self, kind: str, nbytes: float, participants: int) -> float:
        """How long a collective takes in groups of so many devices.

        Args:
          kind: "all-reduce", "all-gather" or "collective-permute".
          nbytes: of its result on one device.
          participants: n; alone a device says nothing.
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

    def _sum(self, collectives: Iterable[Collective]) -> float:
        return sum(self.seconds(*collective) for collective in collectives)


class Hours(NamedTuple):
    """Where the time of a run goes, of the mean device; hours."""

    compute: float
    communication: float
    waiting: float  # for slower devices

    @property
    def total(self) -> float:
        return sum(self)


def hours(
    lengths: Iterable[int],
    cluster: Cluster,
    inner: Sequence[Collective] = (),
    outer: Sequence[Collective] = (),
    inner_steps: int = 1,
    overlap_steps: int = 0,
) -> Hours:
    """The hours of a run's rounds on a cluster.

    Who takes part in a collective waits for the slowest. Between waits of H steps the seconds of
    device i are about normal, with mean H t f_i and standard deviation √H · jitter · t f_i, so
    that K devices of equal speed take

        H t + √H · jitter · t · E[max of K standard normals]

    and wait less at one average of H steps than at H averages of one; what a slow device takes
    longer is not averaged out. With collectives inside of hubs first a hub waits for its slowest,
    and the round's end for the slowest hub. That hubs on a ring wait for their neighbours only is
    not counted: all wait.

    A round's end that overlaps τ steps costs what it takes longer than these. They are not counted
    against waiting, which is so at most as stated.

    Args:
      lengths: H of every round, steps.
      inner: what one inner stage says, collectives (kind, bytes, participants) in groups of
        devices with successive numbers.
      outer: what one round's end says; all devices wait there.
      inner_steps: of one inner stage.
      overlap_steps: τ, the last of a round's H, without inner stages.

    >>> cluster = Cluster(8, 0, step_seconds=3.6, devices=2, jitter=0.1)
    >>> every_step = hours([100], cluster, inner=[("all-reduce", 1e9, 2)])
    >>> rarely = hours([25] * 4, cluster, outer=[("all-reduce", 1e9, 2)])
    >>> [round(part, 4) for part in every_step], [round(part, 4) for part in rarely]
    ([0.1, 0.0278, 0.0056], [0.1, 0.0011, 0.0011])
    """
    if inner_steps < 1 or overlap_steps < 0:
        raise ConfigurationError(
            f"an inner stage takes at least 1 step and an overlap at least 0, got {inner_steps} "
            f"and {overlap_steps}"
        )
    inner_seconds, outer_seconds = cluster._sum(inner), cluster._sum(outer)
    step, waits = float(cluster.step.mean()), _Waits(cluster, inner, bool(outer), inner_steps)
    seconds = np.zeros(3)
    for length, times in Counter(lengths).items():
        compute, hidden = length * step, min(overlap_steps, length) * step
        stages = max(0, length - overlap_steps) // inner_steps
        said = stages * inner_seconds + max(0.0, outer_seconds - hidden)
        seconds += times * np.array([compute, said, max(0.0, waits(length) - compute)])
    return Hours(*(float(part) / 3600 for part in seconds))


class _Waits:
    """The seconds of a round's steps up to the slowest device's last."""

    def __init__(
        self, cluster: Cluster, inner: Sequence[Collective], at_end: bool, inner_steps: int
    ):
        group = max((participants for *_, participants in inner), default=1)
        if cluster.devices % group:
            raise ConfigurationError(
                f"{cluster.devices} devices do not divide into groups of {group}"
            )
        step = cluster.step.reshape(-1, group) * inner_steps
        spread = step * cluster.jitter / math.sqrt(inner_steps)
        self._inner_steps, self._at_end = inner_steps, at_end
        self._groups = [_slowest(*map(tuple, rows)) for rows in zip(step, spread, strict=True)]

    def __call__(self, length: int) -> float:
        stages = length / self._inner_steps
        means = tuple(stages * mean for mean, _ in self._groups)
        spreads = tuple(math.sqrt(stages) * spread for _, spread in self._groups)
        return _slowest(means, spreads)[0] if self._at_end else float(np.mean(means))


@functools.lru_cache(maxsize=4096)
def _slowest(means: tuple[float, ...], spreads: tuple[float, ...]) -> tuple[float, float]:
    """Mean and standard deviation of the maximum of independent normals, whose spreads are in about
    the same ratio to their means.

    With F = ∏ Φ((x − μ_i)/σ_i), which is 0 below a and 1 above b: E = b − ∫ F, and the mean square
    of b − max is 2 ∫ (b − x) F. By the trapezoidal rule, whose error comes from slopes at the ends
    only: there is one, of −1 at b in the second.
    """
    if len(means) == 1:
        return means[0], spreads[0]
    if max(spreads) < 1e-12 * max(means):  # less than float64 tells apart
        return max(means), 0.0
    mean, spread = np.array(means), np.array(spreads)
    low, high = (mean - 9 * spread).max(), (mean + 9 * spread).max()
    x, step = np.linspace(low, high, 577, retstep=True)  # 1/32 of the largest spread, or less
    below = np.ones_like(x)
    for (m, s), times in Counter(zip(means, spreads, strict=True)).items():
        below *= _normal_cdf((x - m) / s) ** times
    expected = high - step * below.sum() + step * below[-1] / 2
    square = 2 * (step * ((high - x) * below).sum() + step**2 / 12)
    return float(expected), math.sqrt(max(0.0, square - (high - expected) ** 2))


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    return np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in z])


class Fit(NamedTuple):
    """T = C + v S: the hours of a run whose communication is v of data parallelism's."""

    compute: float  # C, hours
    communication: float  # S, hours of data parallelism's

    def hours(self, volume: float) -> float:
        return self.compute + volume * self.communication


def fit(first: tuple[float, float], second: tuple[float, float]) -> Fit:
    """C and S of two runs whose hours are known, each as (v, T).

    They differ in their communication alone; waiting counts as communication as far as it goes
    with the number of averages, and else as compute.

    >>> fit((1.0, 10.0), (0.25, 7.0))
    Fit(compute=6.0, communication=4.0)

    Raises:
      ConfigurationError: numbers that are not positive, equal volumes, or hours that no C ≥ 0 and
        S ≥ 0 explain.
    """
    for name, place in (("communication volume", 0), ("number of hours", 1)):
        for point in (first, second):
            if not 0 < point[place] < math.inf:
                raise ConfigurationError(f"the {name} must be a number > 0, got {point[place]}")
    (v, hours_v), (w, hours_w) = sorted((first, second), reverse=True)
    if v == w:
        raise ConfigurationError(
            f"two runs of the same communication volume, {v:g}, do not tell what it costs"
        )
    slope = (hours_v - hours_w) / (v - w)
    result = Fit(hours_v - v * slope, slope)
    if min(result) < 0:
        raise ConfigurationError(
            f"{hours_v:g} hours at a communication volume of {v:.4g} and {hours_w:g} at {w:.4g} "
            f"leave {result.compute:.4g} hours of compute and {result.communication:.4g} of "
            f"communication"
        )
    return result
