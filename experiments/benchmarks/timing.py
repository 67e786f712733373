"""Time programs in alternation, and summarise the seconds that they take."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def interleaved_seconds(
    programs: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
    """Time programs in alternation: every repeat runs each of them once.

    What slows the machine down for a while then slows all programs down, and the ratios of their
    seconds in one repeat remain valid. One run of each program precedes the repeats, since it
    compiles.

    Args:
      programs: functions without arguments, by name; each returns the arrays to wait for.
      repeats: number of runs of each program that count.

    Returns:
      The seconds of each program in each repeat, by name.

    >>> seconds = interleaved_seconds({"sum": lambda: jax.numpy.arange(3).sum()}, repeats=2)
    >>> len(seconds["sum"])
    2
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Summarise values by their median, minimum and maximum.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def ratio_spread(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Summarise the ratios of two programs' seconds, which are divided repeat by repeat.

    >>> ratio_spread([2.0, 6.0, 3.0], [1.0, 2.0, 3.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])
