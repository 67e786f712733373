"""How the figures of the suite `scaling` are shown."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from experiments.benchmarks.benchmarking import spread_of
from experiments.benchmarks.speed.workloads import Workload
from experiments.plotting.display import columns

KINDS = {"strong": "of {} workers in all", "weak": "of one worker a device"}


def show_scaling(workload: Workload, figures: dict[str, Any], console: Console) -> None:
    """The strong and the weak table."""
    for kind, who in KINDS.items():
        rows = figures[kind]
        title = f"{workload.name}, {who.format(workload.workers)}, {workload.steps} steps a round"
        what = "ms a step, and how many times the workers' steps a second of one device"
        _say(console, f"\n{kind} scaling: {title}, {figures['cores']} cores: {what}")
        table = columns("", *map(_label, _first(rows)))
        for name, row in rows.items():
            table.add_row(name, *map(_gained, row["methods"].values()))
        console.print(table, highlight=False)
    _show_failures(figures, console)


def _first(rows: dict[str, Any]) -> Sequence[str]:
    """The methods, of the first row that has any."""
    return next((list(row["methods"]) for row in rows.values() if row["methods"]), [])


def _label(method: str) -> str:
    return method.replace("_", " ")


def _gained(row: dict[str, Any]) -> str:
    return f"{1e3 * np.median(row['seconds']):.3g}, {row['speedup']['median']:.2f}×"


def show_link(workload: Workload, figures: dict[str, Any], console: Console) -> None:
    """For each number of processes the measured milliseconds of a step (least to most), the
    model's, the measured as a multiple of them, what the model leaves out, and the measured beside
    both; last, how many times as long data parallelism takes."""
    delay = f" and {figures['ms']:g} ms" if figures["ms"] else ""
    link = f"{workload.name} over {figures['mbps']:g} Mbit/s{delay}"
    for processes, rows in figures["processes"].items():
        title = f"{link}, {processes}, {workload.workers} workers: ms a step, beside the model's"
        _say(console, f"\n{title} and what that leaves out; how long data parallelism takes")
        names = ("measured", "model", "ratio", "overhead", "with it", "data parallel")
        table = columns("", *names)
        for method, row in rows.items():
            table.add_row(_label(method), *_compared(row))
        console.print(table, highlight=False)
    _show_failures(figures, console)


def _compared(row: dict[str, Any]) -> list[str]:
    took = [1e3 * s for s in row["seconds"]]
    return [
        "{median:.3g} ({least:.3g}–{most:.3g})".format(**spread_of(took)),
        f"{1e3 * row['model']:.3g}",
        f"{row['to_model']['median']:.2f}×",
        f"{1e3 * row['overhead']:.3g}",
        f"{row['to_model_and_overhead']['median']:.2f}×",
        f"{row['faster']['median']:.2f}×",
    ]


def _show_failures(figures: dict[str, Any], console: Console) -> None:
    for name, failure in figures["failures"].items():
        console.print(Text(f"{name} {failure}"), soft_wrap=True)


def _say(console: Console, title: str) -> None:
    console.print(Text(title, style="bold"), soft_wrap=True)
