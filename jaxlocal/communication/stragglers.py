"""Waiting for stragglers: the expected maximum of the random times of several devices."""

import functools
import math
from collections import Counter

import numpy as np

from jaxlocal.communication.collective_costs import Cluster
from jaxlocal.errors import ConfigurationError


class RoundSeconds:
    """Expected seconds of a round's steps, until the slowest device has done the last of them.

    Args:
      cluster: the devices, with the mean and jitter of their steps.
      group: devices that wait for each other after every inner stage; they have successive numbers.
      inner_steps: the steps of one inner stage.
      common_end: whether all devices wait for each other at the end of a round; otherwise the
        groups are averaged.

    Raises:
      ConfigurationError: the devices do not divide into the groups.

    >>> cluster = Cluster(10, 0, step_seconds=2.0, devices=2, jitter=0.1)
    >>> seconds = RoundSeconds(cluster, group=1, inner_steps=1, common_end=True)
    >>> round(seconds(16), 4)  # 16 · 2 + √16 · 0.1 · 2 / √π
    32.4514
    """

    def __init__(self, cluster: Cluster, group: int, inner_steps: int, common_end: bool):
        if cluster.devices % group:
            raise ConfigurationError(
                f"{cluster.devices} devices do not divide into groups of {group}"
            )
        step = cluster.step.reshape(-1, group) * inner_steps
        deviation = step * cluster.jitter / math.sqrt(inner_steps)
        self._inner_steps, self._common_end = inner_steps, common_end
        self._groups = [
            maximum_of_normals(*map(tuple, rows)) for rows in zip(step, deviation, strict=True)
        ]

    def __call__(self, length: int) -> float:
        """Seconds of a round of `length` steps."""
        stages = length / self._inner_steps
        means = tuple(stages * mean for mean, _ in self._groups)
        deviations = tuple(math.sqrt(stages) * deviation for _, deviation in self._groups)
        if not self._common_end:
            return float(np.mean(means))
        return maximum_of_normals(means, deviations)[0]


@functools.lru_cache(maxsize=4096)
def maximum_of_normals(
    means: tuple[float, ...], deviations: tuple[float, ...]
) -> tuple[float, float]:
    """Mean and standard deviation of the maximum of independent normal variables.

    With F(x) = ∏ Φ((x − μ_i)/σ_i), which is 0 below a and 1 above b,

        E max = b − ∫ F(x) dx        E (b − max)² = 2 ∫ (b − x) F(x) dx

    over [a, b], by the trapezoidal rule. Its error comes from the slopes at the ends alone, and
    only the second integrand has one, −1 at b.

    Args:
      means: μ_i.
      deviations: σ_i, in about the same ratio to the means.

    Returns:
      The mean and the standard deviation.

    >>> mean, deviation = maximum_of_normals((0.0, 0.0), (1.0, 1.0))
    >>> round(mean * math.sqrt(math.pi), 6)  # E max of two standard normals is 1/√π
    1.0
    """
    if len(means) == 1:
        return means[0], deviations[0]
    if max(deviations) < 1e-12 * max(means):  # float64 cannot resolve it
        return max(means), 0.0
    mean, deviation = np.array(means), np.array(deviations)
    low, high = (mean - 9 * deviation).max(), (mean + 9 * deviation).max()
    x, step = np.linspace(low, high, 577, retstep=True)  # 1/32 of the largest deviation, or less
    below = np.ones_like(x)
    for (m, s), times in Counter(zip(means, deviations, strict=True)).items():
        below *= _normal_cdf((x - m) / s) ** times
    expected = high - step * below.sum() + step * below[-1] / 2
    square = 2 * (step * ((high - x) * below).sum() + step**2 / 12)
    return float(expected), math.sqrt(max(0.0, square - (high - expected) ** 2))


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    return np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in z])
