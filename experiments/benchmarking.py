"""How programs are measured: in turns, on a machine whose load is told, by what their compilation
says of memory."""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# The load, as a part of the cores, above which a machine is at other work too: without this program
# and with it.
QUIET, ALONE = 0.25, 1.25
POLL_SECONDS = 5.0


def load() -> float:
    """Processes that want a core, the mean over the last minute, as a part of the cores."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def wait_until_idle(seconds: float) -> float:
    """Wait for an idle machine, at most so long; returns the load."""
    end = time.monotonic() + seconds
    while load() > QUIET and time.monotonic() < end:
        time.sleep(max(0.0, min(POLL_SECONDS, end - time.monotonic())))
    return load()


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
