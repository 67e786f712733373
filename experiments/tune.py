"""Compare settings fairly: each at its own best learning rate of a common grid, over fresh seeds.

python -m experiments.tune --settings=FILE --learning_rates=0.02,0.05,0.1 --seeds=3, and flags of
experiments.train, which all settings share. A line of the file is NAME: --flag=value --flag=value.

Each setting is run at every learning rate with --seed. The best by final test accuracy (by test
loss where there is none) is run again with the next --seeds seeds, of which the mean and its
standard error are told. The same command again goes on where it stopped.
"""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from absl import flags

from experiments.building.checks import check_numbers
from experiments.building.config import Config
from experiments.building.job import build_job
from experiments.launching.command_line import FAILED, INTERRUPTED, define_flags, run_binary
from experiments.launching.starting import start
from experiments.plan import plan
from experiments.plotting.display import number
from experiments.running.recording import SUMMARY, check_same_run, write_json, write_whole
from experiments.train import train
from experiments.tuning.results import DIVERGED, diverged, figures_of, markdown, rank
from experiments.tuning.settings import read_settings
from jaxlocal import ConfigurationError

RESULTS, TABLE, LOG = "results.json", "table.md", "log.txt"
# How a run has ended that is not run again.
ENDED = ("finished", "training loss", DIVERGED)


class _Stopped(Exception):
    """A run ended early; its exit status."""


def tune(config: Config, settings_file: Path, rates: Sequence[float], jobs: int = 1) -> int:
    """Tune and run every setting of a file, so many runs at once; returns the exit status."""
    settings = read_settings(settings_file, config)
    start(settings.values(), jobs)
    folder = Path(config.workdir or f"runs/tune-{settings_file.stem}")
    planned = {name: _planned(name, chosen, rates) for name, chosen in settings.items()}
    trials = {name: _trials(chosen, folder / name, rates) for name, chosen in settings.items()}
    for one in itertools.chain(*trials.values()):
        check_same_run(Path(one.workdir or ""), one)
    try:
        tried = _run_all(trials, jobs)
        best = {name: _best(trials[name], tried[name]) for name in settings}
        again = {name: _again(settings[name], folder / name, best[name]) for name in settings}
        found = _run_all(again, jobs)
    except _Stopped as stopped:
        return stopped.args[0]
    figures = {
        name: figures_of(
            planned[name],
            dict(zip(rates, tried[name], strict=True)),
            best[name],
            dict(zip((one.seed for one in again[name]), found[name], strict=True)),
        )
        for name in settings
    }
    shared = {"flags": config.flag_lines(), "learning_rates": list(rates)}
    write_json(folder / RESULTS, {**shared, "settings": figures})
    write_whole(folder / TABLE, markdown(figures))
    print(markdown(figures), folder / RESULTS, folder / TABLE, sep="\n")
    return 0


def _planned(name: str, config: Config, rates: Sequence[float]) -> dict[str, Any]:
    """What a setting will say; its mistakes are told here, before the first run."""
    try:
        for rate in rates:
            check_numbers(dataclasses.replace(config, learning_rate=rate, seeds=config.seeds + 1))
        return plan(build_job(dataclasses.replace(config, learning_rate=rates[0])))
    except ConfigurationError as error:
        raise ConfigurationError(f"setting {name}: {error}") from None


def _trials(config: Config, folder: Path, rates: Sequence[float]) -> list[Config]:
    """A setting at every learning rate, each in a folder of its own."""
    return [
        dataclasses.replace(
            config, learning_rate=rate, seeds=1, workdir=str(folder / "tuning" / str(rate))
        )
        for rate in rates
    ]


def _best(trials: list[Config], summaries: list[dict[str, Any]]) -> float | None:
    """The learning rate of the best trial; None where all diverged."""
    tried = [t for t in zip(trials, summaries, strict=True) if not diverged(t[1])]
    return max(tried, key=lambda t: rank(t[1]))[0].learning_rate if tried else None


def _again(config: Config, folder: Path, rate: float | None) -> list[Config]:
    """A setting at its best learning rate with the seeds after the one that it was tuned on."""
    if rate is None:
        return []
    tuned = dataclasses.replace(config, learning_rate=rate, seeds=1)
    return [
        dataclasses.replace(tuned, seed=seed, workdir=str(folder / f"seed_{seed}"))
        for seed in range(config.seed + 1, config.seed + 1 + config.seeds)
    ]


def _run_all(configs: dict[str, list[Config]], jobs: int) -> dict[str, list[dict[str, Any]]]:
    """The summaries of all runs, so many at once, each in one of as many processes."""
    flat = list(itertools.chain(*configs.values()))
    with contextlib.ExitStack() as stack:
        run_each: Any = map
        if jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(jobs, spawn, initializer=start, initargs=(flat, jobs))
            run_each = stack.enter_context(pool).map
        summaries = iter([_told(*done) for done in zip(flat, run_each(_run, flat), strict=True)])
    return {name: list(itertools.islice(summaries, len(ones))) for name, ones in configs.items()}


def _told(config: Config, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary, of which a line is shown."""
    print(f"{config.workdir}: {_in_short(summary)}", flush=True)
    return summary


def _run(config: Config) -> dict[str, Any]:
    """The summary of a run, which is made unless it has ended already."""
    folder = Path(config.workdir or "")
    summary = _ended(folder, config)
    if summary is None:
        status = _train(config, folder)
        summary = _ended(folder, config)
        if summary is None:
            print(f"error: {folder} stopped, see {folder / LOG}", file=sys.stderr)
            raise _Stopped(INTERRUPTED if status == INTERRUPTED else FAILED)
    return summary


def _train(config: Config, folder: Path) -> int:
    """Train; what that shows goes to a log in the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / LOG).open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        return train(config)


def _ended(folder: Path, config: Config) -> dict[str, Any] | None:
    """The summary of this run if it has ended in this folder."""
    check_same_run(folder, config)
    path = folder / SUMMARY
    summary = json.loads(path.read_text()) if path.exists() else None
    return summary if summary and summary["ended"].startswith(ENDED) else None


def _in_short(summary: dict[str, Any]) -> str:
    if diverged(summary):
        return summary["ended"]
    measured = [(name, summary[name]) for name in ("eval_accuracy", "eval_loss")]
    shown = [f"{name} {number(value)}" for name, value in measured if value is not None]
    return ", ".join([*shown, f"{summary['total_seconds']:.1f} s"])


def _main_on(config: Config) -> int:
    if flags.FLAGS.settings is None or not flags.FLAGS.learning_rates:
        raise ConfigurationError("give --settings=FILE and --learning_rates, as in 0.02,0.05,0.1")
    try:
        rates = [float(text) for text in flags.FLAGS.learning_rates]
    except ValueError:
        given = ",".join(flags.FLAGS.learning_rates)
        raise ConfigurationError(f"--learning_rates={given} are not numbers by commas") from None
    return tune(config, Path(flags.FLAGS.settings), sorted(set(rates)), flags.FLAGS.jobs)


def main() -> None:
    define_flags()
    flags.DEFINE_string("settings", None, "File with a line NAME: --flag=value … a setting.")
    flags.DEFINE_list("learning_rates", [], "The grid, separated by commas.")
    flags.DEFINE_integer("jobs", 1, "Runs at once, each in a process.", lower_bound=1)
    run_binary(_main_on, __doc__ or "")


if __name__ == "__main__":
    main()
