"""Fit compute and communication to the known hours of two runs."""

import math
from typing import NamedTuple

from jaxlocal.errors import ConfigurationError


class Fit(NamedTuple):
    """T = C + v S: the hours of a run that communicates v times as much as data parallelism."""

    compute: float  # C, hours
    communication: float  # S, the hours that data parallelism communicates

    def hours(self, volume: float) -> float:
        """T of a run of communication volume v."""
        return self.compute + volume * self.communication


def fit(first: tuple[float, float], second: tuple[float, float]) -> Fit:
    """Fit the hours of compute and communication to two runs, T = C + v S.

    The runs may differ only in how often they communicate. Waiting for stragglers counts as
    communication as far as it is proportional to the number of averages, and else as compute.

    Args:
      first: (v, T) of one run: its communication volume, 1 for data parallelism and 1/H for an
        average every H steps, and its hours.
      second: (v, T) of the other run.

    Returns:
      C and S.

    Raises:
      ConfigurationError: numbers that are not positive, equal volumes, or hours that no C ≥ 0 and
        S ≥ 0 explain.

    >>> fit((1.0, 10.0), (0.25, 7.0))
    Fit(compute=6.0, communication=4.0)

    Source: Gu, Lyu, Arora, Huang, "A Quadratic Synchronization Rule for Distributed Deep Learning",
    ICLR 2024, https://arxiv.org/abs/2310.14423.
    """
    for name, place in (("communication volume", 0), ("number of hours", 1)):
        for point in (first, second):
            if not 0 < point[place] < math.inf:
                raise ConfigurationError(f"the {name} must be a number > 0, got {point[place]}")
    (v, hours_v), (w, hours_w) = sorted((first, second), reverse=True)
    if v == w:
        raise ConfigurationError(
            f"two runs of the same communication volume, {v:g}, do not determine its cost"
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
