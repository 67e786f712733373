"""Run a figure: tune each curve where it is tuned, then run it with every seed."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

from experiments.building.config import Config
from experiments.building.job import build_plan
from experiments.planning.figures import plan_figures
from experiments.reproducing.figure import Curve, Figure
from experiments.reproducing.modelled_hours import Clock, clocks
from experiments.running.metrics import of_average, read_metrics
from experiments.tuning.results import diverged, rank
from experiments.tuning.runs import run_all
from jaxlocal import ConfigurationError
from jaxlocal.communication.hours_fit import fit

Lines = list[dict[str, Any]]


class Found(NamedTuple):
    """What the runs of a curve found."""

    curve: Curve
    tuned: dict[str, Any]  # the best values of what was tuned
    at_edge: tuple[str, ...]  # flags whose best value is the first or the last of several
    runs: list[Lines]  # the measurements of every seed
    ended: list[str]  # why each ended
    plan: dict[str, Any]  # its figures, see `plan_figures`


def run_figure(figure: Figure, folder: Path, jobs: int) -> list[Found]:
    """Run the curves of a figure; what has ended is not run again.

    Args:
      folder: of the runs.
      jobs: runs at once, each in a process.

    Raises:
      ConfigurationError: a curve whose flags do not fit, before the first run.
      Stopped: a run was stopped before its end.
    """
    plans = [_planned(figure, curve) for curve in figure.curves]
    if figure.kind == "plan":
        pairs = list(zip(figure.curves, plans, strict=True))
        return [Found(curve, {}, (), [], [], plan | _hours(curve, pairs)) for curve, plan in pairs]
    timed = [clocks(curve.config, figure.clusters) for curve in figure.curves]
    places = [folder / folder_name(curve) for curve in figure.curves]
    trials = {
        str(place): [_trial(curve, values, place) for values in _grid(curve)]
        for curve, place in zip(figure.curves, places, strict=True)
        if curve.tune
    }
    tried = run_all(trials, jobs)
    best = [_best(curve, tried.get(str(p))) for curve, p in zip(figure.curves, places, strict=True)]
    runs = {
        str(place): [_seed(curve, values, place, seed) for seed in _seeds(figure, curve)]
        for curve, values, place in zip(figure.curves, best, places, strict=True)
    }
    summaries = run_all(runs, jobs)
    return [
        Found(
            curve,
            values,
            _edges(curve, values),
            [_read(Path(config.workdir or ""), own, curve.average) for config in runs[str(place)]],
            [summary["ended"] for summary in summaries[str(place)]],
            plan,
        )
        for curve, values, place, plan, own in zip(
            figure.curves, best, places, plans, timed, strict=True
        )
    ]


def _read(folder: Path, clocks: dict[str, Clock], average: str | None) -> Lines:
    """The measurements of a run, or of a running average of its models, with its modelled hours."""
    lines = [
        line if average is None else of_average(line, average) for line in read_metrics(folder)
    ]
    return [line | {axis: clock(line["step"]) for axis, clock in clocks.items()} for line in lines]


def configs(figure: Figure) -> list[Config]:
    """All configs that a figure may run, without their folders."""
    return [
        dataclasses.replace(curve.config, **values)
        for curve in figure.curves
        for values in _grid(curve)
    ]


def _planned(figure: Figure, curve: Curve) -> dict[str, Any]:
    try:
        return plan_figures(build_plan(curve.config))
    except ConfigurationError as error:
        raise ConfigurationError(f"figure {figure.name}, {curve.name}: {error}") from None


def _hours(curve: Curve, pairs: list[tuple[Curve, dict[str, Any]]]) -> dict[str, float]:
    """The hours of a curve by T = C + v·S, through the two of its group whose hours are known.

    Raises:
      ConfigurationError: the group has not two curves with published hours, or they do not fit.
    """
    if curve.group is None:
        return {}
    group = [(c, plan["communication_volume"]) for c, plan in pairs if c.group == curve.group]
    known = [(volume, c.published["hours"]) for c, volume in group if "hours" in c.published]
    if len(known) != 2:
        raise ConfigurationError(
            f"group {curve.group!r} has {len(known)} curves with published hours; a fit needs 2"
        )
    volume = next(volume for c, volume in group if c.name == curve.name)
    return {"hours": fit(*known).hours(volume)}


def _seeds(figure: Figure, curve: Curve) -> range:
    """The seeds of the runs; trials, where there are any, have the first seed for themselves."""
    first = curve.config.seed + bool(curve.tune)
    return range(first, first + figure.seeds)


def _grid(curve: Curve) -> list[dict[str, Any]]:
    """Every choice of the values that are tuned; one empty choice where nothing is."""
    return [
        dict(zip(curve.tune, chosen, strict=True))
        for chosen in itertools.product(*curve.tune.values())
    ]


def _trial(curve: Curve, values: dict[str, Any], place: Path) -> Config:
    name = ",".join(f"{flag}={value}" for flag, value in values.items())
    return dataclasses.replace(curve.config, **values, workdir=str(place / "tuning" / name))


def _seed(curve: Curve, values: dict[str, Any], place: Path, seed: int) -> Config:
    return dataclasses.replace(
        curve.config, **values, seed=seed, workdir=str(place / f"seed_{seed}")
    )


def _best(curve: Curve, tried: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The values of the best trial, by test accuracy and then by test loss.

    Raises:
      ConfigurationError: all trials diverged.
    """
    if tried is None:
        return {}
    if all(map(diverged, tried)):
        raise ConfigurationError(f"{curve.name}: all of {curve.tune} diverged; give smaller values")
    pairs = zip(_grid(curve), tried, strict=True)
    return max(pairs, key=lambda pair: rank(pair[1]))[0]


def _edges(curve: Curve, values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        flag
        for flag, choices in curve.tune.items()
        if len(choices) > 1 and values[flag] in (min(choices), max(choices))
    )


def folder_name(curve: Curve) -> str:
    """The name of a curve's folder."""
    swept = f"-{curve.sweep[0]}={curve.sweep[1]:g}" if curve.sweep else ""
    return re.sub(r"[^\w.=-]+", "_", curve.runs_of or curve.name).strip("_") + swept
