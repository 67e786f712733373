"""How programs are measured: in turns, on a machine whose load is told, by what their compilation
says of memory."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

QUIET = 0.1  # the part of the cores above which others use so much that figures are in doubt
SAMPLE_SECONDS = 2.0


class Others:
    """What others use of the machine's cores, from now on.

    Args:
      children: processes whose use is not others' either, beside this one and its ended children.
    """

    def __init__(self, children: Sequence[int] = ()):
        self._children = children
        self._before = self._seconds()

    def share(self) -> float | None:
        """The part of all cores' time since then; None where the system does not say."""
        now = self._seconds()
        if self._before is None or now is None:
            return None
        used, passed = (b - a for a, b in zip(self._before, now, strict=True))
        return min(1.0, max(0.0, used / passed)) if passed else 0.0

    def _seconds(self) -> tuple[float, float] | None:
        """Of all cores since the machine's start: what others used, and what there was."""
        try:
            with open("/proc/stat") as file:
                cores = [int(field) for field in file.readline().split()[1:9]]
        except OSError:
            return None
        unit = os.sysconf("SC_CLK_TCK")
        idle, passed = sum(cores[3:5]), sum(cores)  # those that wait for a disk are idle
        own = sum(os.times()[:4]) + sum(processor_ticks(pid) for pid in self._children) / unit
        return (passed - idle) / unit - own, passed / unit


def processor_ticks(pid: int) -> int:
    """The processor time of a process that runs, as Linux counts it; 0 when it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def wait_until_idle(seconds: float) -> float | None:
    """Wait until the machine is idle, at most so long; returns what others use of its cores."""
    end = time.monotonic() + seconds
    while True:
        others = Others()
        time.sleep(min(SAMPLE_SECONDS, max(0.1, seconds)))
        share = others.share()
        if share is None or share <= QUIET or time.monotonic() >= end:
            return share


def in_turns(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each program takes, one after another and over again, so that what slows the
    machine for a while slows all of them.

    A first call of each, which compiles, does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread_of(values: list[float]) -> dict[str, float]:
    """The median, and the least and the most.

    >>> spread_of([3.0, 1.0, 2.0])
    {'median': 2.0, 'least': 1.0, 'most': 3.0}
    """
    return {"median": float(np.median(values)), "least": min(values), "most": max(values)}


def ratios_of(seconds: list[float], to: list[float]) -> dict[str, float]:
    """The spread of the ratios of two programs' seconds, turn by turn.

    >>> ratios_of([2.0, 6.0, 3.0], to=[1.0, 2.0, 3.0])
    {'median': 2.0, 'least': 1.0, 'most': 3.0}
    """
    return spread_of([a / b for a, b in zip(seconds, to, strict=True)])


def peak_bytes(fn: Callable, *shapes: Any, donate: tuple[int, ...] = ()) -> int:
    """The most that a device holds while it runs the function: arguments, results that are not in
    their place, and what is needed in between."""
    compiled = jax.jit(fn, donate_argnums=donate).lower(*shapes).compile()
    sizes: Any = compiled.memory_analysis()
    return (
        sizes.temp_size_in_bytes
        + sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
    )
