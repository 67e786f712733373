"""Peak memory of this process, or of its accelerators."""

import resource
from pathlib import Path

import jax


def resident_bytes() -> int:
    """Memory that this process holds now, in bytes, as Linux states it; elsewhere the peak."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Reset the peak memory of this process, where Linux can: compiling needs more than running."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes_above(baseline: int) -> int:
    """Peak memory of the accelerators, where they state it, else of this process above a baseline.

    Args:
      baseline: bytes that the process held before, see `resident_bytes`.
    """
    stats = [device.memory_stats() for device in jax.devices()]
    if all(stats):
        return sum(one["peak_bytes_in_use"] for one in stats if one)
    return _status("VmHWM") - baseline


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
