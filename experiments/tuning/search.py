"""Run settings at every learning rate of a grid, and the best again with other seeds."""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.building.checks import check_numbers
from experiments.building.config import Config
from experiments.building.job import build_job
from experiments.launching.starting import start
from experiments.planning.figures import plan_figures
from experiments.running.locking import locked
from experiments.running.recording import check_same_run, write_json, write_whole
from experiments.tuning.results import diverged, figures_of, markdown, rank
from experiments.tuning.runs import Stopped, run_all
from experiments.tuning.settings import read_settings
from jaxlocal import ConfigurationError

RESULTS, TABLE = "results.json", "table.md"


def tune(config: Config, settings_file: Path, rates: Sequence[float], jobs: int = 1) -> int:
    """Tune every setting of a file, run it with other seeds, and write and print the table.

    Args:
      config: the flags that all settings share; `seeds` is the number of runs of a tuned setting.
      settings_file: see `read_settings`.
      rates: learning rates of the grid.
      jobs: runs at once, each in a process.

    Returns:
      The exit status.

    Raises:
      ConfigurationError: a setting that does not fit, before the first run; or another process
        tunes in the same folder.
    """
    _check_alone(config)
    settings = read_settings(settings_file, config)
    start(settings.values(), jobs)
    folder = Path(config.workdir or f"runs/tune-{settings_file.stem}")
    trials = {name: _trials(name, chosen, folder, rates) for name, chosen in settings.items()}
    planned = {name: _planned(name, ones[0]) for name, ones in trials.items()}
    for one in itertools.chain(*trials.values()):
        check_same_run(Path(one.workdir or ""), one)
    with locked(folder):
        try:
            tried = run_all(trials, jobs)
            best = {name: _best(trials[name], tried[name]) for name in settings}
            again = {name: _again(settings[name], folder / name, best[name]) for name in settings}
            found = run_all(again, jobs)
        except Stopped as stopped:
            print(f"error: {stopped.sentence}", file=sys.stderr)
            return stopped.status
        figures = {
            name: figures_of(
                planned[name],
                dict(zip(rates, tried[name], strict=True)),
                best[name],
                dict(zip((one.seed for one in again[name]), found[name], strict=True)),
            )
            for name in settings
        }
        _write(config, folder, rates, figures)
    return 0


def _check_alone(config: Config) -> None:
    """Check that the flags join no other process."""
    for name in ("coordinator_address", "process_count", "process_id", "distributed"):
        given = getattr(config, name)
        if given != getattr(Config, name):
            raise ConfigurationError(f"a search is one process, and --{name}={given} was given")


def _write(
    config: Config, folder: Path, rates: Sequence[float], figures: dict[str, dict[str, Any]]
) -> None:
    shared = {"flags": config.flag_lines(), "learning_rates": list(rates)}
    write_json(folder / RESULTS, {**shared, "settings": figures})
    write_whole(folder / TABLE, markdown(figures))
    print(markdown(figures), folder / RESULTS, folder / TABLE, sep="\n")


def _trials(name: str, config: Config, folder: Path, rates: Sequence[float]) -> list[Config]:
    """A setting at every learning rate, each with a folder.

    Raises:
      ConfigurationError: numbers out of range, here or in the runs with other seeds.
    """
    trials = []
    for rate in rates:
        place = folder / name / "tuning" / str(rate)
        tuned = dataclasses.replace(config, learning_rate=rate, workdir=str(place))
        with _named(name):
            check_numbers(dataclasses.replace(tuned, seed=config.seed + 1))
        trials.append(dataclasses.replace(tuned, seeds=1))
    return trials


def _planned(name: str, config: Config) -> dict[str, Any]:
    """The figures of the plan of a setting.

    Raises:
      ConfigurationError: flags of the setting that do not fit each other.
    """
    with _named(name):
        return plan_figures(build_job(config))


@contextlib.contextmanager
def _named(setting: str) -> Iterator[None]:
    """Name the setting in errors."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"setting {setting}: {error}") from None


def _best(trials: list[Config], summaries: list[dict[str, Any]]) -> float | None:
    """The learning rate of the best trial; None where all diverged."""
    tried = [t for t in zip(trials, summaries, strict=True) if not diverged(t[1])]
    return max(tried, key=lambda t: rank(t[1]))[0].learning_rate if tried else None


def _again(config: Config, folder: Path, rate: float | None) -> list[Config]:
    """A setting at its best learning rate, with the seeds after the one of its trials."""
    if rate is None:
        return []
    tuned = dataclasses.replace(config, learning_rate=rate, seeds=1)
    return [
        dataclasses.replace(tuned, seed=seed, workdir=str(folder / f"seed_{seed}"))
        for seed in range(config.seed + 1, config.seed + 1 + config.seeds)
    ]
