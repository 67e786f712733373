"""Print the figures of the suite `scaling`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from experiments.benchmarks.timing import spread
from experiments.benchmarks.workloads import Workload
from experiments.plotting.display import columns

KINDS = {"strong": "{} workers in all", "weak": "one worker per device"}


def show_speedups(workload: Workload, figures: dict[str, Any], console: Console) -> None:
    """Print the tables of strong and of weak scaling, see `measure_speedups`."""
    for kind, workers in KINDS.items():
        rows = figures[kind]
        task = (
            f"{workload.name}, {workers.format(workload.workers)}, {workload.steps} steps a round"
        )
        meaning = "ms a step, and the speed-up in workers' steps a second over one device"
        _print_title(console, f"{kind} scaling: {task}, {figures['cores']} cores: {meaning}")
        table = columns("", *map(_label, _first_methods(rows)))
        for name, row in rows.items():
            table.add_row(name, *map(_speedup, row["methods"].values()))
        console.print(table, highlight=False)
    _show_failures(figures, console)


def _first_methods(rows: dict[str, Any]) -> Sequence[str]:
    """The methods of the first row that has any."""
    return next((list(row["methods"]) for row in rows.values() if row["methods"]), [])


def _label(method: str) -> str:
    return method.replace("_", " ")


def _speedup(row: dict[str, Any]) -> str:
    return f"{1e3 * np.median(row['seconds']):.3g}, {row['speedup']['median']:.2f}×"


def show_link_costs(workload: Workload, figures: dict[str, Any], console: Console) -> None:
    """Print a table for each number of processes, see `measure_over_link`.

    Columns: the measured milliseconds of a step (min to max), the predicted ones and the ratio of
    the two, the overhead and the ratio to both, and the speed-up over data parallelism.
    """
    delay = f" and {figures['ms']:g} ms" if figures["ms"] else ""
    link = f"{workload.name} over {figures['mbps']:g} Mbit/s{delay}"
    for processes, rows in figures["processes"].items():
        title = (
            f"{link}, {processes}, {workload.workers} workers: ms a step, measured and predicted"
        )
        _print_title(console, f"{title}, overhead, and speed-up over data parallelism")
        names = ("measured", "predicted", "ratio", "overhead", "with it", "speed-up")
        table = columns("", *names)
        for method, row in rows.items():
            table.add_row(_label(method), *_link_cells(row))
        console.print(table, highlight=False)
    _show_failures(figures, console)


def _link_cells(row: dict[str, Any]) -> list[str]:
    milliseconds = [1e3 * s for s in row["seconds"]]
    return [
        "{median:.3g} ({min:.3g}–{max:.3g})".format(**spread(milliseconds)),
        f"{1e3 * row['predicted']:.3g}",
        f"{row['ratio_to_predicted']['median']:.2f}×",
        f"{1e3 * row['overhead']:.3g}",
        f"{row['ratio_to_predicted_and_overhead']['median']:.2f}×",
        f"{row['speedup_over_data_parallel']['median']:.2f}×",
    ]


def _show_failures(figures: dict[str, Any], console: Console) -> None:
    for name, failure in figures["failures"].items():
        console.print(Text(f"{name} {failure}"), soft_wrap=True)


def _print_title(console: Console, title: str) -> None:
    console.print(Text(f"\n{title}", style="bold"), soft_wrap=True)
