"""Run the suite `start`."""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console
from rich.text import Text

from experiments.benchmarks.child_process import ChildProcess
from experiments.benchmarks.machine_load import OtherLoad, wait_until_idle
from experiments.benchmarks.start.program import PHASES, TRAIN
from experiments.plotting.display import columns

CASES = ("mll_cnn", "resnet18", "transformer", TRAIN)
CACHES = ("cold", "warm")  # an empty compilation cache, and that of the process before


def run(
    cases: Sequence[str], repeats: int, limit: float, wait_idle: float, console: Console
) -> dict[str, Any]:
    """Measure how long new processes take to the end of their first round.

    Each repeat starts every case with an empty compilation cache, and again with the cache that
    this has filled.

    Args:
      cases: names of workloads, of which a process runs one round, and `train`, which runs all of
        `python -m experiments.train`.
      repeats: processes of each case and cache.
      limit: seconds to wait for one process.
      wait_idle: seconds to wait for an idle machine.
      console: where the table is printed.

    Returns:
      The figures: "cases", for each case and cache the replies of its processes, "seconds" by phase
      and the number of "programs" compiled or found, "other_load_before" and "other_load_during".

    Raises:
      ChildFailed: a process failed, or did not end in time.
    """
    before, load = wait_until_idle(wait_idle), OtherLoad()
    figures: dict[str, Any] = {case: {cache: [] for cache in CACHES} for case in cases}
    for _ in range(repeats):
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                for cache in CACHES:
                    figures[case][cache].append(_started(case, folder, limit))
    _show(figures, console)
    return {"cases": figures, "other_load_before": before, "other_load_during": [load.share()]}


def _started(case: str, folder: str, limit: float) -> dict[str, Any]:
    """What a new process replies whose compiled programs are kept in a folder."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    program = [sys.executable, "-m", "experiments.benchmarks.start.program", case]
    with mock.patch.dict(os.environ, kept):
        child = ChildProcess([*program, str(time.monotonic())], limit)
    try:
        return child.reply()
    finally:
        child.close()


def _show(figures: dict[str, Any], console: Console) -> None:
    table = columns("", "cache", "seconds", *PHASES, "programs")
    for case, caches in figures.items():
        for cache, replies in caches.items():
            phases = [np.median([r["seconds"][name] for r in replies]) for name in PHASES]
            total = np.median([sum(r["seconds"].values()) for r in replies])
            cells = [f"{seconds:.2f}" for seconds in (total, *phases)]
            table.add_row(case, cache, *cells, str(replies[-1]["programs"]))
    title = "\nfrom the start of a process to the end of its first round, and of all of train"
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table, highlight=False)
