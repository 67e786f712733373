"""One run for each of several seeds, and what they have in common."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.building.config import Config
from experiments.building.job import build_job
from experiments.plotting.curves import plot_several
from experiments.plotting.display import number, show_table
from experiments.running.recording import CURVES, SUMMARY, claim, read_metrics, write_json

# Of the last measurement of every seed: the mean and its standard error are in the summary.
FIGURES = (
    *("train_loss", "eval_loss", "eval_accuracy", "best_eval_accuracy", "total_seconds"),
    *("round", "bits_workers", "bits_hubs"),
)


def train_several(config: Config, folder: Path, train: Callable[[Config], int]) -> int:
    """Run the seeds one after another, each in a subfolder; the same command again goes on.

    Returns the exit status of the first that failed, which ends it, or 0.
    """
    build_job(config)  # a mistake is told before anything is written
    first = jax.process_index() == 0  # of several processes the one that writes
    if first:
        claim(folder, config)
        (folder / SUMMARY).unlink(missing_ok=True)
    seeds = range(config.seed, config.seed + config.seeds)
    folders = [folder / f"seed_{seed}" for seed in seeds]
    for seed, place in zip(seeds, folders, strict=True):
        one = dataclasses.replace(config, seed=seed, seeds=1, workdir=str(place))
        if status := train(one):
            return status
    if first:
        _leave(config, folder, seeds, folders)
    return 0


def _leave(config: Config, folder: Path, seeds: range, folders: list[Path]) -> None:
    """Summary, picture and table of all seeds."""
    figures = {"seeds": list(seeds), **_summary(folders), "flags": config.flag_lines()}
    write_json(folder / SUMMARY, figures)
    title = f"{config.method} on {config.dataset}, {config.workers} workers, {len(seeds)} seeds"
    plot_several([read_metrics(place) for place in folders], folder / CURVES, title)
    console = Console()
    show_table(console, f"\n{title}", _rows(figures))
    for name in (SUMMARY, CURVES):
        console.print(str(folder / name), highlight=False, soft_wrap=True)


def mean_and_error(values: list[float]) -> dict[str, Any]:
    """The mean, and its standard error s / √n, s with n − 1.

    >>> mean_and_error([1.0, 2.0, 3.0])["mean"], round(mean_and_error([1.0, 2.0, 3.0])["error"], 4)
    (2.0, 0.5774)
    """
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "error": error, "values": values}


def _summary(folders: list[Path]) -> dict[str, Any]:
    summaries = [json.loads((folder / SUMMARY).read_text()) for folder in folders]
    figures = {}
    for name in FIGURES:
        values = [summary.get(name) for summary in summaries]
        if all(value is not None for value in values):
            figures[name] = mean_and_error(values)
    same = ("method", "period", "dataset", "model", "hubs", "workers", "versions")
    return {"ended": [s["ended"] for s in summaries], **figures} | {
        name: summaries[0][name] for name in same
    }


def _rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("seeds", ", ".join(map(str, figures["seeds"])))]
    for name in FIGURES[:5]:
        if name in figures:
            mean, error = figures[name]["mean"], figures[name]["error"]
            rows.append((name.replace("_", " "), f"{number(mean)} ± {number(error)}"))
    return rows
