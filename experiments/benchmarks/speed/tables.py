"""Print the figures of the suite `speed`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.benchmarks.speed.comparison import different_losses
from experiments.benchmarks.speed.contender import CONTENDERS, JAXLOCAL
from experiments.benchmarks.timing import spread
from experiments.benchmarks.workloads import Workload
from experiments.plotting.display import columns


def show_comparison(figures: dict[str, Any], console: Console) -> None:
    """Print the contenders on one workload, see `compare_contenders`."""
    workload = Workload(*(figures[field] for field in Workload._fields))
    rows = figures["contenders"]
    table = columns("", "seconds a round", "jaxlocal is", "compile", "memory")
    for name, row in _without_slower_limit(rows).items():
        table.add_row(CONTENDERS[name].label, *_cells(name, row))
    rate = rows[JAXLOCAL].get("rounds_per_second")
    title = f"{workload.title}: {rate:.3g} rounds/s" if rate else workload.title
    _print_table(console, title, table)
    _show_failures(rows, console)
    _show_different_losses(rows, console)


def _without_slower_limit(rows: dict[str, Any]) -> dict[str, Any]:
    """The rows without the slower of those with one shared model: the faster one is the limit."""
    both = [name for name in ("shared", "shared_parallel") if "seconds" in rows.get(name, {})]
    slower = sorted(both, key=lambda name: np.median(rows[name]["seconds"]))[1:]
    return {name: row for name, row in rows.items() if name not in slower}


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    return [
        _spread(row["seconds"]) if "seconds" in row else row["failure"].split(":")[0],
        "" if name == JAXLOCAL else spread_of_ratio(row.get("ratio")),
        f"{row['compile_seconds']:.3g} s" if "compile_seconds" in row else "",
        f"{row['memory_bytes'] / 2**20:,.0f} MiB" if "memory_bytes" in row else "",
    ]


def _show_failures(rows: dict[str, Any], console: Console) -> None:
    for name, row in rows.items():
        if ":" in (row["failure"] or ""):
            console.print(Text(f"{CONTENDERS[name].label} {row['failure']}"), soft_wrap=True)


def _show_different_losses(rows: dict[str, Any], console: Console) -> None:
    for name in different_losses(rows):
        loss, own = rows[name]["loss"], rows[JAXLOCAL]["loss"]
        label = CONTENDERS[name].label
        console.print(f"not the same training: the loss of {label} is {loss:.6g}, here {own:.6g}")


def show_growth(figures: dict[str, Any], console: Console) -> None:
    """Print time and memory by the number of workers, see `measure_growth`."""
    table = columns("workers", "seconds a round", "time per worker", "program")
    for workers, row in figures["workers"].items():
        took = _spread(row["seconds"]) if row["seconds"] else row["failure"]
        size = f"{row['program_bytes'] / 2**20:.2f} MiB"
        table.add_row(workers, took, spread_of_ratio(row.get("time_per_worker")), size)
    title = f"{figures['title']}: time per worker relative to the fewest workers"
    _print_table(console, title, table)


def _print_table(console: Console, title: str, table: Table) -> None:
    console.print(Text(f"\n{title}", style="bold"), soft_wrap=True)
    console.print(table, highlight=False)


def _spread(values: Sequence[float]) -> str:
    """
    >>> _spread([0.0123, 0.0456, 20.0])
    '0.046 (0.012–20.0)'
    """
    return "{median} ({min}–{max})".format(**_rounded(spread(values), 3))


def spread_of_ratio(ratio: dict[str, float] | None) -> str:
    """
    >>> spread_of_ratio({"median": 1.5, "min": 1.25, "max": 20.0})
    '1.50× (1.25–20.0)'
    """
    return "{median}× ({min}–{max})".format(**_rounded(ratio, 2)) if ratio else ""


def _rounded(values: dict[str, float], decimals: int) -> dict[str, str]:
    return {name: f"{x:.{decimals if x < 10 else 1}f}" for name, x in values.items()}
