"""Read the runs in some folders, each of one seed or of several, to compare them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparing.folders import seed_folders
from experiments.comparing.labels import labels
from experiments.plotting.comparison import Curves
from experiments.plotting.curves import running_averages
from experiments.running.metrics import METRICS, OF_AVERAGES, read_metrics
from jaxlocal import ConfigurationError

KEYS = (
    *("step", "round", "time_slots", "wall_seconds", "train_loss", "eval_loss", "eval_accuracy"),
    *("bits_workers", "bits_hubs"),
)


def load_runs(folders: Sequence[Path]) -> list[Curves]:
    """Read the runs in some folders, with labels that distinguish them.

    The running averages of a run, such as its EMA, follow it as runs of their own.

    Raises:
      ConfigurationError: a folder that is not a run, that is given twice, or whose metrics are
        damaged or have fewer than two measurements.
    """
    places = [folder.resolve() for folder in folders]
    for before, folder in enumerate(folders):
        if places[before] in places[:before]:
            raise ConfigurationError(f"{folder} is given twice")
    values = [_read(folder) for folder in folders]
    runs = [Curves(*pair) for pair in zip(labels(folders), values, strict=True)]
    return [curves for run in runs for curves in (run, *_averages_of(run))]


def _averages_of(run: Curves) -> list[Curves]:
    """The running averages of a run, of which there are test metrics alone."""
    unknown = {"train_loss": np.full_like(run.values["train_loss"], np.nan)}
    tested = lambda name: {
        key: run.values[f"{key}_{name}"] for key in ("eval_loss", "eval_accuracy")
    }
    return [
        Curves(f"{run.label}: {name.upper()}", run.values | unknown | tested(name))
        for name in running_averages(run.values)
    ]


def _read(folder: Path) -> dict[str, np.ndarray]:
    """The metrics of all seeds, [seeds, measurements], up to the end of the shortest."""
    lines = [_lines(path) for path in seed_folders(folder)]
    length = min(map(len, lines))
    lines = [seed[:length] for seed in lines]
    keys = [key for key in lines[0][0] if all(key in line for seed in lines for line in seed)]
    values = {key: np.array([[line[key] for line in seed] for seed in lines]) for key in keys}
    if (values["step"] != values["step"][0]).any():
        raise ConfigurationError(f"the seeds in {folder} were not measured at the same steps")
    return values


def too_short(folder: Path) -> bool:
    """Whether a run has fewer than two measurements."""
    return min(len(_lines(path, least=0)) for path in seed_folders(folder)) < 2


def _lines(folder: Path, least: int = 2) -> list[dict[str, Any]]:
    """The measurements of one seed."""
    path = folder / METRICS
    # Without a count of its own, a measurement is of a run that does not wait: a slot is a step.
    measured = [{"time_slots": line["step"], **line} for line in read_metrics(folder)]
    wanted = lambda key: key in KEYS or key.startswith(OF_AVERAGES)
    lines = [{key: _number(line[key]) for key in line if wanted(key)} for line in measured]
    if len(lines) < least:
        raise ConfigurationError(
            f"{path} holds {len(lines)} measurements, and a curve needs 2 or more"
        )
    return lines


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
