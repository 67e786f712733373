"""Measure how much of the machine other processes use, since they distort timings."""

import os
import time
from collections.abc import Sequence

BUSY_SHARE = 0.1  # timings are in doubt when other processes use a larger share of the cores
SAMPLE_SECONDS = 2.0


class OtherLoad:
    """Measure the share of the machine's cores that other processes use from now on.

    Args:
      children: ids of running child processes, whose use does not count as that of others. This
        process and its children that have ended never count.
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
    """CPU seconds that a running process has used, as Linux counts them; 0 once it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
