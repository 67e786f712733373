"""The folder of a run: its flags, a line for every measurement, and a summary."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from experiments.building.config import PLACE, Config
from jaxlocal import ConfigurationError

METRICS, SUMMARY, FLAGS, CURVES = "metrics.jsonl", "summary.json", "flags.txt", "curves.png"
PREVIOUS = "metrics.previous.jsonl"  # kept while a run that replaces them is under way
CHECKPOINTS, TENSORBOARD, PARTITION = "checkpoints", "tensorboard", "partition.png"


def record(folder: Path, config: Config, seeds: tuple[Path, Config] | None = None) -> "Recorder":
    """The recorder of a run's folder; of several processes only the first writes.

    Args:
      seeds: folder and config of several seeds, if the run is one of them; the folder is claimed
        for them too.

    Raises:
      ConfigurationError: see `Recorder` and `ReadOnlyRecorder`.
    """
    recorder = None
    if jax.process_index() == 0:
        if seeds:
            claim(*seeds)
            (seeds[0] / SUMMARY).unlink(missing_ok=True)
        recorder = Recorder(folder, config)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the folder is claimed")
    return recorder or ReadOnlyRecorder(folder, config)


class Recorder:
    """Write a run's folder, its flags first, so that no other run uses the folder.

    Raises:
      ConfigurationError: the folder holds a run with other flags, or cannot be written.
    """

    def __init__(self, folder: Path, config: Config):
        self.folder = folder
        self.lines: list[dict[str, Any]] = []
        claim(folder, config)

    def begin(self, step: int, measurements: int | None = None) -> None:
        """Start at a step, with the measurements up to it; at step 0 without any.

        Args:
          measurements: the number of them that the checkpoint of the step notes, if it does.

        Raises:
          ConfigurationError: the folder does not hold these measurements.
        """
        metrics = self.folder / METRICS
        if step and not metrics.exists():
            raise ConfigurationError(
                f"the workdir {self.folder} has a checkpoint of step {step} but no {METRICS}; "
                f"delete {self.folder / CHECKPOINTS} to start again"
            )
        if step:
            self.lines = [line for line in read_metrics(self.folder) if line["step"] <= step]
            if measurements not in (None, len(self.lines)):
                raise ConfigurationError(
                    f"{metrics} holds {len(self.lines)} of the {measurements} measurements up to "
                    f"step {step}, at which there is a checkpoint; delete "
                    f"{self.folder / CHECKPOINTS} to start again"
                )
        elif metrics.exists() and not (self.folder / PREVIOUS).exists():
            os.replace(metrics, self.folder / PREVIOUS)
        write_whole(metrics, "".join(map(_as_line, self.lines)))
        (self.folder / SUMMARY).unlink(missing_ok=True)
        self._file = metrics.open("a")
        self._board = _Board(self.folder / TENSORBOARD)
        for line in self.lines:
            self._board.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Write one measurement to the file."""
        self.lines.append(line)
        self._file.write(_as_line(line))
        self._file.flush()
        self._board.add(line)

    def flush(self) -> None:
        """Wait until all measurements are on disk, as they must be before a checkpoint that is
        newer."""
        os.fsync(self._file.fileno())

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, and close the files."""
        self._file.close()
        self._board.close()
        if summary["ended"] != "interrupted":
            (self.folder / PREVIOUS).unlink(missing_ok=True)
        write_json(self.folder / SUMMARY, summary)


class ReadOnlyRecorder(Recorder):
    """The recorder of a process that does not write: the first process writes the folder.

    Raises:
      ConfigurationError: this process does not see that folder.
    """

    def __init__(self, folder: Path, config: Config):
        self.folder = folder
        self.lines = []
        if not (folder / FLAGS).exists():
            raise ConfigurationError(
                f"the workdir {folder.absolute()} of process 0 is not seen by process "
                f"{jax.process_index()}; it must be a folder that all processes share"
            )

    def begin(self, step: int, measurements: int | None = None) -> None:
        pass

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        pass

    def finish(self, summary: dict[str, Any]) -> None:
        pass


class _Board:
    """Write the measurements for TensorBoard: every number of a line as a scalar at its step."""

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))

    def add(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the measurements of a run's folder, without an incomplete last line of a killed run.

    Raises:
      ConfigurationError: another line that is not a measurement.
    """
    lines = (folder / METRICS).read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [_measurement(folder / METRICS, *numbered) for numbered in enumerate(lines, 1)]


def _measurement(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise ConfigurationError(f"{path} is damaged: its line {number} is not a measurement")
    return values


def finite(values: Any) -> Any:
    """The values with None in place of numbers that JSON does not have: NaN and the infinities."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it exists completely or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file, completely or not at all."""
    write_whole(path, json.dumps(finite(values), indent=2, ensure_ascii=False) + "\n")


def claim(folder: Path, config: Config) -> None:
    """Reserve the folder for this run, by writing its flags there.

    Raises:
      ConfigurationError: the folder holds a run with other flags, or cannot be written.
    """
    check_same_run(folder, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FLAGS, "\n".join(config.flag_lines()) + "\n")
    except OSError as error:
        raise ConfigurationError(
            f"the workdir {folder} cannot be written: {error.strerror}"
        ) from None


def check_same_run(folder: Path, config: Config) -> None:
    """Check that the folder is free for this run, or holds this run.

    Raises:
      ConfigurationError: the folder holds a run with other flags, or something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"the workdir {folder} is a file")
    if not (folder / FLAGS).exists():
        if (folder / METRICS).exists():
            raise ConfigurationError(
                f"the workdir {folder} holds {METRICS} but no {FLAGS}: it is not a run of this "
                f"program"
            )
        return
    lines = (folder / FLAGS).read_text(errors="replace").splitlines()
    theirs = {line for line in lines if line and line.split("=")[0] not in PLACE}
    ours = set(config.identity_lines())
    if ours != theirs:
        held = " ".join(sorted(theirs - ours)[:3]) or "none of them"
        given = " ".join(sorted(ours - theirs)[:3]) or "none of them"
        raise ConfigurationError(
            f"the workdir {folder} holds a run with other flags: it has {held}, this run {given}"
        )


def _as_line(line: dict[str, Any]) -> str:
    return json.dumps(finite(line)) + "\n"
