"""The lines of metrics.jsonl and the summary of a run, as they are read from its folder."""

import json
from pathlib import Path
from typing import Any

from experiments.building.files import LARGEST, read_text
from jaxlocal import ConfigurationError

METRICS, SUMMARY = "metrics.jsonl", "summary.json"
WHOLE = ("step", "round", "local_steps", "bits_workers", "bits_hubs")
WHOLE_IF_ANY = ("time_slots",)  # which runs of earlier versions do not have
REAL = ("wall_seconds", "learning_rate")
REAL_OR_NONE = ("train_loss", "eval_loss", "eval_accuracy", "consensus_distance")
OF_AVERAGES = ("eval_loss_", "eval_accuracy_")  # and the name of a running average
LARGEST_NUMBER = 1e300


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the measurements of a run's folder, without an incomplete last line of a killed run.

    Raises:
      ConfigurationError: the file cannot be read, another line is not a measurement, or the steps
        do not ascend.
    """
    path = folder / METRICS
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{path} is not a file")
    lines: list[dict[str, Any]] = []
    try:
        with path.open("rb") as file:
            while line := file.readline(LARGEST):
                if not line.endswith(b"\n") and len(line) < LARGEST:
                    break
                lines.append(_measurement(path, len(lines) + 1, line))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    for number, (before, after) in enumerate(zip(lines, lines[1:], strict=False), 2):
        if after["step"] <= before["step"]:
            raise ConfigurationError(
                f"{path} is damaged: its line {number} is of step {after['step']}, and the one "
                f"before it of step {before['step']}"
            )
    return lines


def _measurement(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not _is_complete(values):
        raise ConfigurationError(f"{path} is damaged: its line {number} is not a measurement")
    return values


def _is_complete(values: dict[str, Any]) -> bool:
    """Whether a line has every figure of a measurement, each of its type."""
    averages = {
        name.removeprefix(of) for of in OF_AVERAGES for name in values if name.startswith(of)
    }
    real_or_none = [*REAL_OR_NONE, *(f"{of}{name}" for of in OF_AVERAGES for name in averages)]
    if not all(name in values for name in (*WHOLE, *REAL, *real_or_none)):
        return False
    counted = [*WHOLE, *(name for name in WHOLE_IF_ANY if name in values)]
    whole = all(type(values[n]) is int and 0 <= values[n] < LARGEST_NUMBER for n in counted)
    known = [values[name] for name in real_or_none if values[name] is not None]
    real = [values[name] for name in REAL] + known
    return whole and all(type(x) in (int, float) and abs(x) < LARGEST_NUMBER for x in real)


def of_average(line: dict[str, Any], name: str) -> dict[str, Any]:
    """A measurement of a running average of the models in the place of their average.

    Only its test metrics are measured.

    >>> of_average({"step": 4, "train_loss": 0.5, "eval_loss": 0.7, "eval_loss_ema": 0.6}, "ema")
    {'step': 4, 'train_loss': None, 'eval_loss': 0.6}
    """
    own = {f"{key}{name}": key.removesuffix("_") for key in OF_AVERAGES if f"{key}{name}" in line}
    rest = {key: value for key, value in line.items() if not key.startswith(OF_AVERAGES)}
    return rest | {"train_loss": None} | {key: line[full] for full, key in own.items()}


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Read the summary of a run that has ended; None where it is missing or damaged.

    The same command as the run's writes it again.
    """
    try:
        summary = json.loads(read_text(folder / SUMMARY, "the summary"))
    except (ConfigurationError, ValueError, RecursionError):
        return None
    known = isinstance(summary, dict) and isinstance(summary.get("ended"), str)
    return summary if known else None
