"""Measure how much of the machine other processes use, since they distort timings."""

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

BUSY_SHARE = 0.1  # timings are in doubt when other processes use a larger share of the cores
SAMPLE_SECONDS = 2.0


class OtherLoad:
    """Measure the share of the machine's cores that other processes use from now on.

    Args:
      children: ids of running child processes, whose use does not count as that of others, and
        neither does that of their sessions. This process and its children that have ended never
        count.
    """

    def __init__(self, children: Sequence[int] = ()):
        self._children = children
        self._before = self._cpu_seconds()

    def share(self) -> float | None:
        """Share of all cores' time that other processes used, in [0, 1]; None if unknown."""
        now = self._cpu_seconds()
        if self._before is None or now is None:
            return None
        used, passed = (b - a for a, b in zip(self._before, now, strict=True))
        return min(1.0, max(0.0, used / passed)) if passed else 0.0

    def _cpu_seconds(self) -> tuple[float, float] | None:
        """CPU seconds since the machine started, of all cores: those used by others, and all."""
        try:
            with open("/proc/stat") as file:
                cores = [int(field) for field in file.readline().split()[1:9]]
        except OSError:
            return None
        unit = os.sysconf("SC_CLK_TCK")
        idle, passed = sum(cores[3:5]), sum(cores)  # a core that waits for a disk is idle
        own = sum(os.times()[:4]) + sum(map(cpu_seconds, self._children))
        return (passed - idle) / unit - own, passed / unit


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a running process and those of its session have used, as Linux counts them.

    0 once it has ended.
    """
    used = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = status.read_text().rpartition(")")[2].split()
            if pid in (int(status.parent.name), int(fields[3])):
                used += int(fields[11]) + int(fields[12])
    return used / os.sysconf("SC_CLK_TCK")


def wait_until_idle(seconds: float) -> float | None:
    """Wait until other processes use less than `BUSY_SHARE` of the cores.

    Args:
      seconds: how long to wait at most.

    Returns:
      The share that they used when last measured, in [0, 1]; None if unknown.
    """
    end = time.monotonic() + seconds
    while True:
        load = OtherLoad()
        time.sleep(min(SAMPLE_SECONDS, max(0.1, seconds)))
        share = load.share()
        if share is None or share <= BUSY_SHARE or time.monotonic() >= end:
            return share
