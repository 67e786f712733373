"""Run many configs, several at once, except those that have ended."""

import contextlib
import itertools
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from experiments.building.config import Config
from experiments.launching.starting import start
from experiments.launching.statuses import FAILED, INTERRUPTED
from experiments.plotting.display import number
from experiments.running.recording import SUMMARY, check_same_run
from experiments.running.training import train
from experiments.tuning.results import DIVERGED, diverged

LOG = "log.txt"
# Beginnings of the reason why a run ended, after which it is not run again.
ENDED = ("finished", "training loss", DIVERGED)


class Stopped(Exception):
    """A run was stopped before its end."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def run_all(configs: dict[str, list[Config]], jobs: int) -> dict[str, list[dict[str, Any]]]:
    """Run all configs; returns their summaries.

    Args:
      jobs: runs at once, each in a process.

    Raises:
      Stopped: a run was stopped before its end.
    """
    flat = list(itertools.chain(*configs.values()))
    with contextlib.ExitStack() as stack:
        run_each: Any = map
        if jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(jobs, spawn, initializer=start, initargs=(flat, jobs))
            run_each = stack.enter_context(pool).map
        summaries = iter([_shown(*done) for done in zip(flat, run_each(_run, flat), strict=True)])
    return {name: list(itertools.islice(summaries, len(ones))) for name, ones in configs.items()}


def _shown(config: Config, summary: dict[str, Any]) -> dict[str, Any]:
    """Print one line about a summary, and return it."""
    print(f"{config.workdir}: {_in_short(summary)}", flush=True)
    return summary


def _in_short(summary: dict[str, Any]) -> str:
    if diverged(summary):
        return summary["ended"]
    measured = [(name, summary[name]) for name in ("eval_accuracy", "eval_loss")]
    shown = [f"{name} {number(value)}" for name, value in measured if value is not None]
    return ", ".join([*shown, f"{summary['total_seconds']:.1f} s"])


def _run(config: Config) -> dict[str, Any]:
    """The summary of a run, which is made unless it has ended already."""
    folder = Path(config.workdir or "")
    summary = _ended(folder, config)
    if summary is None:
        status = _train(config, folder)
        summary = _ended(folder, config)
        if summary is None:
            print(f"error: {folder} stopped, see {folder / LOG}", file=sys.stderr)
            raise Stopped(INTERRUPTED if status == INTERRUPTED else FAILED)
    return summary


def _train(config: Config, folder: Path) -> int:
    """Train, and write what that prints to a log in the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / LOG).open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        return train(config)


def _ended(folder: Path, config: Config) -> dict[str, Any] | None:
    """The summary in a run's folder, if the run has ended."""
    check_same_run(folder, config)
    path = folder / SUMMARY
    summary = json.loads(path.read_text()) if path.exists() else None
    return summary if summary and summary["ended"].startswith(ENDED) else None
