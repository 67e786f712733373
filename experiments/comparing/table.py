"""The table of a comparison: how good runs end, and what they cost."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.plotting.comparison import Curves
from experiments.plotting.curves import MEGABYTE
from experiments.plotting.display import data_size, number
from experiments.running.seeds import mean_and_error


def common_accuracy(runs: Sequence[Curves]) -> float | None:
    """The largest accuracy that all runs reach; None if a run is a regression."""
    if not all(run.has_accuracy for run in runs):
        return None
    return min(float(np.nanmax(run.mean("eval_accuracy"))) for run in runs)


def cost_to_reach(run: Curves, target: float, cost: str) -> float | None:
    """The cost of a run at its first measurement with an accuracy ≥ target; None if it has none."""
    reached = np.flatnonzero(run.mean("eval_accuracy") >= target)
    return float(run.mean(cost)[reached[0]]) if len(reached) else None


def show(runs: Sequence[Curves], target: float | None) -> None:
    """Print the last metrics of each run, and its costs to the end and to a target accuracy."""
    accuracies = any(run.has_accuracy for run in runs)
    costs = [c for c in COSTS if c != "time slots" or any(run.waits for run in runs)]
    names = ["train loss", "test loss", *(["accuracy", "best"] if accuracies else [])]
    names += ["rounds", *costs]
    names += [f"{cost} to {target:.4f}" for cost in costs] if target is not None else []
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(Text(run.label), *map(Text, _row(run, accuracies, costs, target)))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 200)  # a file has no width at which lines must wrap
    console.print(table, highlight=False)


def _row(run: Curves, accuracies: bool, costs: list[str], target: float | None) -> list[str]:
    cells = [_last(run, "train_loss", ".4g"), _last(run, "eval_loss", ".4g")]
    if accuracies:
        best = np.nanmax(run.mean("eval_accuracy")) if run.has_accuracy else None
        cells += [_last(run, "eval_accuracy", ".4f"), _or_dash(best, "{:.4f}".format)]
    cells += [number(round(run.mean("round")[-1]))]
    columns = [COSTS[cost] for cost in costs]
    cells += [form(run.mean(key)[-1]) for key, form in columns]
    if target is not None:
        cells += [_or_dash(cost_to_reach(run, target, key), form) for key, form in columns]
    return cells


def _size(megabytes: float) -> str:
    return data_size(round(megabytes * MEGABYTE))


# The columns of costs: the key of the metrics, and how a value is written.
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "sent": ("megabytes", _size),
    "seconds": ("wall_seconds", "{:.1f}".format),
    "time slots": ("time_slots", "{:,.0f}".format),
}


def _last(run: Curves, key: str, form: str) -> str:
    """The last measurement, and its standard error over seeds."""
    values = run.values[key][:, -1]
    if not np.isfinite(values).all():
        return "—"
    figure = mean_and_error(values.tolist())
    error = f" ± {figure['error']:.1g}" if len(values) > 1 else ""
    return f"{figure['mean']:{form}}{error}"


def _or_dash(value: Any, form: Callable[[Any], str]) -> str:
    return "—" if value is None else form(value)
