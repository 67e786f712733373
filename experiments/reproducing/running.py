"""Run a figure: tune each curve where it is tuned, then run it with every seed."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, NamedTuple

from experiments.building.config import Config
from experiments.building.job import build_plan
from experiments.planning.figures import plan_figures
from experiments.reproducing.figure import Curve, Figure, folder_name
from experiments.reproducing.modelled_hours import Clock, clocks
from experiments.running.metrics import of_average, read_metrics
from experiments.running.recording import check_same_run
from experiments.tuning.results import diverged, rank
from experiments.tuning.runs import run_all
from jaxlocal import ConfigurationError
from jaxlocal.communication.hours_fit import fit

Lines = list[dict[str, Any]]


class Found(NamedTuple):
    """What the runs of a curve found."""

    curve: Curve
    tuned: dict[str, Any]  # the best values of what was tuned; none where all diverged
    at_edge: tuple[str, ...]  # flags whose best value is the first or the last of several
    seeds: list[int]
    runs: list[Lines]  # the measurements of every seed
    ended: list[str]  # why each ended
    plan: dict[str, Any]  # its figures, see `plan_figures`


def run_figure(figure: Figure, folder: Path, jobs: int) -> list[Found]:
    """Run the curves of a figure; what has ended is not run again.

    Args:
      folder: of the runs.
      jobs: runs at once, each in a process.

    Raises:
      ConfigurationError: a curve whose flags do not fit, or a folder that holds a run with other
        flags, before the first run.
      Stopped: a run was stopped before its end.
    """
    plans = [_planned(figure, curve) for curve in figure.curves]
    if figure.kind == "plan":
        pairs = list(zip(figure.curves, plans, strict=True))
        return [
            Found(curve, {}, (), [], [], [], plan | _hours(curve, pairs)) for curve, plan in pairs
        ]
    timed = [clocks(curve.config, figure.clusters) for curve in figure.curves]
    places = [folder / folder_name(curve) for curve in figure.curves]
    _check_folders(figure, places)
    trials = {
        str(place): [_trial(curve, values, place) for values in _grid(curve)]
        for curve, place in zip(figure.curves, places, strict=True)
        if _is_tuned(curve)
    }
    tried = run_all(trials, jobs)
    best = [_best(curve, tried.get(str(p))) for curve, p in zip(figure.curves, places, strict=True)]
    runs = {
        str(place): [_seed(curve, values, place, seed) for seed in _seeds(figure, curve)]
        for curve, values, place in zip(figure.curves, best, places, strict=True)
        if values is not None
    }
    ended = {
        place: [summary["ended"] for summary in summaries]
        for place, summaries in run_all(runs, jobs).items()
    }
    return [
        _found(curve, values, runs.get(str(place), []), ended.get(str(place), []), plan, own)
        for curve, values, place, plan, own in zip(
            figure.curves, best, places, plans, timed, strict=True
        )
    ]


def _found(
    curve: Curve,
    values: dict[str, Any] | None,
    configs: list[Config],
    ended: list[str],
    plan: dict[str, Any],
    clocks: dict[str, Clock],
) -> Found:
    """What the runs of a curve found; values are None where all trials diverged."""
    return Found(
        curve,
        values or {},
        _edges(curve, values or {}),
        [config.seed for config in configs],
        [_read(Path(config.workdir or ""), clocks, curve.average) for config in configs],
        ended,
        plan,
    )


def _check_folders(figure: Figure, places: list[Path]) -> None:
    """Check that no folder holds a run with other flags, before the first run."""
    for curve, place in zip(figure.curves, places, strict=True):
        for values in _grid(curve):
            if _is_tuned(curve):
                trial = _trial(curve, values, place)
                check_same_run(Path(trial.workdir or ""), trial)
            for seed in _seeds(figure, curve):
                one = _seed(curve, values, place, seed)
                check_same_run(Path(one.workdir or ""), one)


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
    first = curve.config.seed + _is_tuned(curve)
    return range(first, first + figure.seeds)


def _is_tuned(curve: Curve) -> bool:
    """Whether trials choose between values of a grid."""
    return len(_grid(curve)) > 1


def _grid(curve: Curve) -> list[dict[str, Any]]:
    """Every choice of the values that are tuned; one empty choice where nothing is."""
    return [
        dict(zip(curve.tune, chosen, strict=True))
        for chosen in itertools.product(*curve.tune.values())
    ]


def _trial(curve: Curve, values: dict[str, Any], place: Path) -> Config:
    return dataclasses.replace(
        curve.config, **values, workdir=str(place / "tuning" / ",".join(_chosen(values)))
    )


def _seed(curve: Curve, values: dict[str, Any], place: Path, seed: int) -> Config:
    name = ",".join([f"seed_{seed}", *_chosen(values)])
    return dataclasses.replace(curve.config, **values, seed=seed, workdir=str(place / name))


def _chosen(values: dict[str, Any]) -> list[str]:
    return [f"{flag}={str(value).replace('/', '_')}" for flag, value in values.items()]


def _best(curve: Curve, tried: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    """The values of the best trial, by test accuracy and then by test loss; None where all
    diverged."""
    if tried is None:
        return _grid(curve)[0]
    if all(map(diverged, tried)):
        return None
    pairs = zip(_grid(curve), tried, strict=True)
    return max(pairs, key=lambda pair: rank(pair[1]))[0]


def _edges(curve: Curve, values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        flag
        for flag, choices in curve.tune.items()
        if values and _is_scale(choices) and values[flag] in (min(choices), max(choices))
    )


def _is_scale(choices: list[Any]) -> bool:
    """Whether choices are several numbers, which have a smallest and a largest."""
    return len(choices) > 1 and not any(isinstance(one, str | bool) for one in choices)
