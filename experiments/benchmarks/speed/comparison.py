"""Compare the contenders on one workload."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.speed.contender import CONTENDERS, JAXLOCAL
from experiments.benchmarks.speed.fingerprint import relative_difference
from experiments.benchmarks.speed.interleaved import Timings, time_interleaved
from experiments.benchmarks.timing import ratio_spread
from experiments.benchmarks.workloads import Workload, workload_to_json

SAME_LOSS = 1e-3  # relative difference of two contenders' losses that rounding may cause


def compare_contenders(
    workload: Workload,
    repeats: int,
    limit: float,
    worker_map: str | None = None,
    contenders: Sequence[str] = tuple(CONTENDERS),
) -> dict[str, Any]:
    """Time the rounds of contenders of the suite `speed` on a workload.

    Args:
      workload: what is trained.
      repeats: rounds of each contender that count.
      limit: seconds to wait for one round.
      worker_map: how a device runs jaxlocal's workers; by default the library's choice.
      contenders: their names.

    Returns:
      As `compare_commands`.
    """
    absent = {"torch"} if importlib.util.find_spec("torch") is None else set()
    return compare_commands(
        workload,
        {
            name: None if name in absent else contender_command(name, workload, worker_map)
            for name in contenders
        },
        repeats,
        limit,
    )


def compare_commands(
    workload: Workload,
    commands: Mapping[str, Sequence[str] | None],
    repeats: int,
    limit: float,
) -> dict[str, Any]:
    """Time the rounds of contenders on a workload.

    Args:
      workload: what is trained.
      commands: that start the contenders, by name; None for one that is not installed.
      repeats: rounds of each contender that count.
      limit: seconds to wait for one round.

    Returns:
      The fields of the workload; "contenders": by name the "failure" or None, the "seconds" of each
      round, the spread of their "ratio" to jaxlocal's in the same repeat, the relative "difference"
      of the models after the first round, where both show theirs, and what the contender replied
      when it was ready; "other_load": see `time_interleaved`.
    """
    installed = {name: command for name, command in commands.items() if command is not None}
    timings, load = time_interleaved(installed, repeats, limit)
    missing = Timings({}, [], "not installed")
    rows = {name: _row(timings.get(name, missing), timings[JAXLOCAL]) for name in commands}
    return {**workload._asdict(), "contenders": rows, "other_load": load}


def contender_command(
    contender: str,
    workload: Workload,
    worker_map: str | None = None,
    python: str = sys.executable,
    module: str = "experiments.benchmarks.speed.contender",
) -> list[str]:
    """The command that starts the process of a contender, by an interpreter and a module."""
    return [
        *(python, "-m", module),
        *(f"--contender={contender}", f"--workload={workload_to_json(workload)}"),
        *([f"--worker_map={worker_map}"] if worker_map else []),
    ]


def _row(timings: Timings, reference: Timings) -> dict[str, Any]:
    """The figures of a contender, with ratios to those of the reference."""
    row = {**timings.ready, "failure": timings.failure}
    moved, own = row.pop("moved", None), reference.ready.get("moved")
    if moved and own:
        row["difference"] = relative_difference(moved, own)
    if not timings.replies:
        return row
    row["seconds"] = timings.seconds
    row["rounds_per_second"] = 1 / float(np.median(timings.seconds))
    if reference.replies:
        row["ratio"] = ratio_spread(timings.seconds, reference.seconds)
    if "memory_bytes" in timings.replies[-1]:
        row["memory_bytes"] = max(reply["memory_bytes"] for reply in timings.replies)
    return row


def different_losses(rows: dict[str, Any]) -> list[str]:
    """Names of the contenders whose loss in the first round differs from jaxlocal's.

    Args:
      rows: the figures of the contenders by name, see `compare_contenders`.
    """
    own = rows[JAXLOCAL].get("loss")
    alike = [name for name in ("vmap", "torch") if "loss" in rows.get(name, {})]
    return [n for n in alike if own is None or not np.isclose(rows[n]["loss"], own, SAME_LOSS)]
