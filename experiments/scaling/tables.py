"""How the figures of the suite `scaling` are shown."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from experiments.display import columns, spread_text, times_text
from experiments.speed.workloads import Workload

KINDS = {"strong": "of {} workers in all", "weak": "of one worker a device"}


def show_scaling(workload: Workload, figures: dict[str, Any], console: Console) -> None:
    """The strong and the weak table."""
    for kind, who in KINDS.items():
        rows = figures[kind]
        title = f"{workload.name}, {who.format(workload.workers)}, {workload.ticks} ticks a round"
        what = "ms a tick, and how many times as fast as one device"
        _say(console, f"\n{kind} scaling: {title}, {figures['cores']} cores: {what}")
        table = columns("", *_first(rows))
        for name, row in rows.items():
            table.add_row(name, *map(_gained, row["methods"].values()))
        console.print(table, highlight=False)
    _show_failures(figures, console)


def _first(rows: dict[str, Any]) -> Sequence[str]:
    """The methods, of the first row that has any."""
    return next((list(row["methods"]) for row in rows.values() if row["methods"]), [])


def _gained(row: dict[str, Any]) -> str:
    return f"{1e3 * np.median(row['seconds']):.3g}, {row['speedup']['median']:.2f}×"


def show_link(workload: Workload, figures: dict[str, Any], console: Console) -> None:
    """For each number of processes, the measured and the model's seconds."""
    delay = f" and {figures['ms']:g} ms" if figures["netem"] else ", without a delay"
    link = f"{workload.name} over {figures['mbps']:g} Mbit/s{delay}"
    if not figures["netem"]:
        console.print("this kernel has no netem, which makes packets late: the link is only slow")
    for processes, rows in figures["processes"].items():
        _say(console, f"\n{link}, {processes}, {workload.workers} workers: ms a tick")
        names = ("measured", "model", "measured is", "overhead", "with it", "data parallel takes")
        table = columns("", *names)
        for method, row in rows.items():
            table.add_row(method, *_compared(row))
        console.print(table, highlight=False)
    _show_failures(figures, console)


def _compared(row: dict[str, Any]) -> list[str]:
    return [
        spread_text([1e3 * s for s in row["seconds"]]),
        f"{1e3 * row['model']:.3f}",
        f"{row['to_model']['median']:.2f}×",
        f"{1e3 * row['overhead']:.3f}",
        f"{row['to_model_and_overhead']['median']:.2f}×",
        times_text(row["faster"]),
    ]


def _show_failures(figures: dict[str, Any], console: Console) -> None:
    for name, failure in figures["failures"].items():
        console.print(Text(f"{name} {failure}"), soft_wrap=True)


def _say(console: Console, title: str) -> None:
    console.print(Text(title, style="bold"), soft_wrap=True)
