"""Run many configs, several at once, except those that have ended."""

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from experiments.building.config import Config
from experiments.launching.starting import start
from experiments.launching.statuses import FAILED
from experiments.launching.stopping import (
    WORDS,
    Interrupted,
    asked,
    raising,
    status_of,
    watch_patiently,
)
from experiments.plotting.display import number
from experiments.running.metrics import read_summary
from experiments.running.recording import check_same_run
from experiments.running.training import train
from experiments.tuning.results import DIVERGED, FIGURES, diverged

LOG = "log.txt"
RESUMING = "the same command resumes the search"
# Beginnings of the reason why a run ended, after which it is not run again.
ENDED = ("finished", "training loss", DIVERGED)


class Stopped(Exception):
    """A run was stopped before its end."""

    def __init__(self, sentence: str, status: int):
        super().__init__(sentence, status)
        self.sentence, self.status = sentence, status


def run_all(configs: dict[str, list[Config]], jobs: int) -> dict[str, list[dict[str, Any]]]:
    """Run all configs; returns their summaries.

    Args:
      jobs: runs at once, each in a process.

    Raises:
      Stopped: a run was stopped before its end.
    """
    flat = list(itertools.chain(*configs.values()))
    with _pool(flat, jobs) if jobs > 1 else contextlib.nullcontext(map) as run_each:
        summaries = iter([_shown(*done) for done in zip(flat, run_each(_run, flat), strict=True)])
    return {name: list(itertools.islice(summaries, len(ones))) for name, ones in configs.items()}


@contextlib.contextmanager
def _pool(configs: list[Config], jobs: int) -> Iterator[Callable]:
    """The `map` of a pool of processes, which a signal asks to save their runs and to end."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, spawn, initializer=_begin, initargs=(configs, jobs))
    with pool, raising():
        try:
            yield pool.map
        except BaseException as error:
            if isinstance(error, Interrupted):
                for process in multiprocessing.active_children():
                    process.terminate()
            pool.shutdown(cancel_futures=True)  # which waits for the runs that are under way
            if isinstance(error, Interrupted):
                raise Stopped(f"{error}; {RESUMING}", error.status) from None
            raise


def _begin(configs: list[Config], jobs: int) -> None:
    """Set up a process of the pool."""
    watch_patiently()
    start(configs, jobs)


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
    if summary is None and (number := asked()):
        raise Stopped(f"{WORDS[number]}; {RESUMING}", status_of(number))
    if summary is None:
        status = _train(config, folder)
        summary = _ended(folder, config)
        if summary is None:
            how = f"{folder} stopped, see {folder / LOG}; {RESUMING}"
            raise Stopped(how, status or FAILED)
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
    summary = read_summary(folder)
    if summary is None or not summary["ended"].startswith(ENDED):
        return None
    complete = all(name in summary for name in (*FIGURES, "total_seconds"))
    return summary if complete or diverged(summary) else None
