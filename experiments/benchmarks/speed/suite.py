"""The suite `speed`: rounds per second of jaxlocal and how many times those of other ways, for each
workload; and how time and memory grow with the workers."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from experiments.benchmarks.benchmarking import ratios_of, spread_of
from experiments.benchmarks.speed.contender import CONTENDERS, JAXLOCAL
from experiments.benchmarks.speed.in_jax import program_bytes
from experiments.benchmarks.speed.turns import Turns, take_turns
from experiments.benchmarks.speed.workloads import WORKLOADS, Workload
from experiments.plotting.display import columns

GROWTH = (2, 4, 8, 16, 32, 64)  # workers
SAME_LOSS = 1e-3  # part by which contenders' losses may differ by rounding


def compare(
    workload: Workload,
    repeats: int,
    limit: float,
    worker_map: str | None = None,
    contenders: Sequence[str] = tuple(CONTENDERS),
) -> dict[str, Any]:
    """A workload's figures: of every contender, the seconds of a round and their ratio to
    jaxlocal's in the same turn."""
    absent = {"torch"} if importlib.util.find_spec("torch") is None else set()
    commands = {n: _command(n, workload, worker_map) for n in contenders if n not in absent}
    turns, others = take_turns(commands, repeats, limit)
    missing = Turns({}, [], "not installed")
    rows = {name: _row(turns.get(name, missing), turns[JAXLOCAL]) for name in contenders}
    return {**workload._asdict(), "contenders": rows, "others": others}


def _command(contender: str, workload: Workload, worker_map: str | None) -> list[str]:
    module = [sys.executable, "-m", "experiments.benchmarks.speed.contender"]
    chosen = [f"--worker_map={worker_map}"] if worker_map else []
    return [*module, f"--contender={contender}", f"--workload={as_json(workload)}", *chosen]


def as_json(workload: Workload) -> str:
    return json.dumps(workload._asdict())


def _row(turns: Turns, to: Turns) -> dict[str, Any]:
    row = {**turns.ready, "failure": turns.failure}
    if not turns.answers:
        return row
    row["seconds"], row["rounds_per_second"] = turns.seconds, 1 / float(np.median(turns.seconds))
    if to.answers:
        row["ratio"] = ratios_of(turns.seconds, to.seconds)
    if "memory_bytes" in turns.answers[-1]:
        row["memory_bytes"] = max(answer["memory_bytes"] for answer in turns.answers)
    return row


def growth(repeats: int, limit: float, worker_map: str | None = None) -> dict[str, Any]:
    """jaxlocal's time and memory with more and more workers, those of one worker as parts of what
    they are with the fewest."""
    sizes = {str(n): WORKLOADS["mll_cnn"]._replace(workers=n, steps=4) for n in GROWTH}
    commands = {n: _command(JAXLOCAL, w, worker_map) for n, w in sizes.items()}
    turns, others = take_turns(commands, repeats, limit)
    each = {n: [s / int(n) for s in turns[n].seconds] for n in sizes}
    fewest = each[str(GROWTH[0])]
    rows: dict[str, Any] = {}
    for n, workload in sizes.items():
        rows[n] = {"failure": turns[n].failure, "seconds": turns[n].seconds}
        rows[n]["program_bytes_per_worker"] = program_bytes(workload, worker_map) / int(n)
        if each[n] and fewest:
            rows[n]["time_per_worker"] = ratios_of(each[n], fewest)
    return {"workers": rows, "others": others}


def show_workload(figures: dict[str, Any], console: Console) -> None:
    workload = Workload(*(figures[field] for field in Workload._fields))
    rows = figures["contenders"]
    table = columns("", "seconds a round", "jaxlocal is", "compile", "memory")
    for name, row in _without_slower_limit(rows).items():
        first = f"{row['compile_seconds']:.3g} s" if "compile_seconds" in row else ""
        memory = f"{row['memory_bytes'] / 2**20:,.0f} MiB" if "memory_bytes" in row else ""
        ratio = "" if name == JAXLOCAL else _times(row.get("ratio"))
        took = _spread(row["seconds"]) if "seconds" in row else row["failure"].split(":")[0]
        table.add_row(CONTENDERS[name].label, took, ratio, first, memory)
    rate = rows[JAXLOCAL].get("rounds_per_second")
    said = f": {rate:.3g} rounds/s" if rate else ""
    console.print(Text(f"\n{workload.title}{said}", style="bold"), soft_wrap=True)
    console.print(table, highlight=False)
    for name, row in rows.items():
        if ":" in (row["failure"] or ""):
            console.print(Text(f"{CONTENDERS[name].label} {row['failure']}"), soft_wrap=True)
    for name in different_losses(rows):
        loss, own = rows[name]["loss"], rows[JAXLOCAL]["loss"]
        label = CONTENDERS[name].label
        console.print(f"not the same training: the loss of {label} is {loss:.6g}, here {own:.6g}")


def _without_slower_limit(rows: dict[str, Any]) -> dict[str, Any]:
    """The rows with one of shared weights: the faster, which is the limit for a simulation."""
    both = [name for name in ("shared", "shared_parallel") if "seconds" in rows.get(name, {})]
    slower = sorted(both, key=lambda name: np.median(rows[name]["seconds"]))[1:]
    return {name: row for name, row in rows.items() if name not in slower}


def different_losses(rows: dict[str, Any]) -> list[str]:
    """The contenders whose workers did not lose in the first round what jaxlocal's did."""
    own = rows[JAXLOCAL].get("loss")
    alike = [name for name in ("vmap", "torch") if "loss" in rows.get(name, {})]
    return [n for n in alike if own is None or not np.isclose(rows[n]["loss"], own, SAME_LOSS)]


def show_growth(figures: dict[str, Any], console: Console) -> None:
    table = columns("workers", "seconds a round", "a worker's time", "program, a worker")
    for workers, row in figures["workers"].items():
        took = _spread(row["seconds"]) if row["seconds"] else row["failure"]
        size = f"{row['program_bytes_per_worker'] / 2**20:.2f} MiB"
        table.add_row(workers, took, _times(row.get("time_per_worker")), size)
    title = "mll_cnn with more workers, 4 steps: a worker's time beside that with the fewest"
    console.print(Text(f"\n{title}", style="bold"), soft_wrap=True)
    console.print(table, highlight=False)


def _spread(values: list[float]) -> str:
    """
    >>> _spread([0.0123, 0.0456, 20.0])
    '0.046 (0.012–20.0)'
    """
    said = {name: _short(x, 3) for name, x in spread_of(values).items()}
    return "{median} ({least}–{most})".format(**said)


def _times(ratio: dict[str, float] | None) -> str:
    """
    >>> _times({"median": 1.5, "least": 1.25, "most": 20.0})
    '1.50× (1.25–20.0)'
    """
    said = {name: _short(x, 2) for name, x in (ratio or {}).items()}
    return "{median}× ({least}–{most})".format(**said) if said else ""


def _short(value: float, decimals: int) -> str:
    return f"{value:.{decimals if value < 10 else 1}f}"
