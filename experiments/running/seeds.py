"""The report of several seeds: the mean of every figure, and its standard error."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.building.config import Config
from experiments.plotting.curves import plot_several
from experiments.plotting.display import number, show_table
from experiments.running.metrics import OF_AVERAGES, SUMMARY, read_metrics, read_summary
from experiments.running.recording import CURVES, write_json, writing

# Figures of the last measurement of every seed whose means are in the summary.
FIGURES = (
    *("train_loss", "eval_loss", "eval_accuracy", "best_eval_accuracy", "total_seconds"),
    *("round", "bits_workers", "bits_hubs"),
)


def report_seeds(config: Config, folder: Path, seeds: Sequence[int], folders: list[Path]) -> None:
    """Write the summary and the picture of all seeds, and print a table.

    Args:
      folders: of the runs, one for each seed.
    """
    figures = {"seeds": list(seeds), **_summary(folders), "flags": config.flag_lines()}
    write_json(folder / SUMMARY, figures)
    title = f"{config.method} on {config.dataset}, {config.workers} workers, {len(seeds)} seeds"
    with writing(folder / CURVES):
        plot_several([read_metrics(place) for place in folders], folder / CURVES, title)
    console = Console()
    show_table(console, f"\n{title}", _rows(figures))
    for name in (SUMMARY, CURVES):
        console.print(str(folder / name), highlight=False, soft_wrap=True)


def mean_and_error(values: list[float]) -> dict[str, Any]:
    """Mean of n values and its standard error s / √n, with s² = Σ (x − mean)² / (n − 1).

    The error of a single value is None.

    >>> mean_and_error([1.0, 2.0, 3.0])["mean"], round(mean_and_error([1.0, 2.0, 3.0])["error"], 4)
    (2.0, 0.5774)
    """
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "error": error, "values": values}


def _summary(folders: list[Path]) -> dict[str, Any]:
    summaries = [read_summary(folder) or {} for folder in folders]
    figures = {}
    for name in (*FIGURES, *(key for key in summaries[0] if key.startswith(OF_AVERAGES))):
        values = [s[name] for s in summaries if s.get(name) is not None]
        if len(values) == len(summaries):
            figures[name] = mean_and_error(values)
    same = ("method", "period", "dataset", "model", "hubs", "workers", "versions")
    return {"ended": [s.get("ended") for s in summaries], **figures} | {
        name: summaries[0].get(name) for name in same
    }


def _rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("seeds", ", ".join(map(str, figures["seeds"])))]
    for name in figures:
        if name in FIGURES[:5] or name.startswith(OF_AVERAGES):
            mean, error = figures[name]["mean"], figures[name]["error"]
            rows.append((name.replace("_", " "), f"{number(mean)} ± {number(error)}"))
    return rows
