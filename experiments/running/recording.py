"""The folder of a run: its flags, a line for every measurement, and a summary."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from experiments.building.config import PLACE, Config
from experiments.building.files import read_text, short
from experiments.launching.statuses import Failure
from experiments.running.metrics import METRICS, SUMMARY, read_metrics
from experiments.running.tensorboard import Board
from jaxlocal import ConfigurationError

FLAGS, CURVES = "flags.txt", "curves.png"
PREVIOUS = "metrics.previous.jsonl"  # kept while a run that replaces them is under way
CHECKPOINTS, TENSORBOARD, PARTITION = "checkpoints", "tensorboard", "partition.png"


def record(
    folder: Path,
    config: Config,
    check_held: Callable[[], None],
    seeds: tuple[Path, Config] | None = None,
) -> "Recorder":
    """The recorder of a run's folder; of several processes only the first writes.

    Args:
      check_held: see `Recorder`.
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
        recorder = Recorder(folder, config, check_held)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the folder is claimed")
    return recorder or ReadOnlyRecorder(folder, config)


class Recorder:
    """Write a run's folder, its flags first, so that no other run uses the folder.

    Args:
      check_held: raises an error where the folder is not this run's any more; called before each
        measurement, checkpoint and summary.

    Raises:
      ConfigurationError: the folder holds a run with other flags, or cannot be written.
    """

    def __init__(self, folder: Path, config: Config, check_held: Callable[[], None]):
        self.folder = folder
        self._check_held = check_held
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
        with writing(self.folder / TENSORBOARD):
            self._board = Board(self.folder / TENSORBOARD)
            for line in self.lines:
                self._board.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Write one measurement to the file."""
        self._check_held()
        self.lines.append(line)
        with writing(self.folder / METRICS):
            self._file.write(_as_line(line))
            self._file.flush()
        with writing(self.folder / TENSORBOARD):
            self._board.add(line)

    def flush(self) -> None:
        """Wait until all measurements are on disk, as they must be before a checkpoint that is
        newer."""
        self._check_held()
        with writing(self.folder / METRICS):
            os.fsync(self._file.fileno())

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, and close the files."""
        self._check_held()
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
    with writing(path):
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in an error of writing it.

    Raises:
      Failure: the disk is full, or the file cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        raise Failure(f"{path} could not be written: {error.strerror}") from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file, completely or not at all."""
    write_whole(path, json.dumps(finite(values), indent=2, ensure_ascii=False) + "\n")


def claim(folder: Path, config: Config) -> None:
    """Reserve the folder for this run, by writing its flags there.

    Raises:
      ConfigurationError: the folder holds a run with other flags.
      Failure: the file could not be written.
    """
    check_same_run(folder, config)
    write_whole(folder / FLAGS, "\n".join(config.flag_lines()) + "\n")


def check_same_run(folder: Path, config: Config) -> None:
    """Check that the folder is free for this run, or holds this run.

    Raises:
      ConfigurationError: the folder holds a run with other flags, or something else.
    """
    if not _holds_flags(folder):
        return
    lines = read_text(folder / FLAGS, "the file").splitlines()
    theirs = {line for line in lines if line and line.split("=")[0] not in PLACE}
    ours = set(config.identity_lines())
    if ours != theirs:
        held = " ".join(map(short, sorted(theirs - ours)[:3])) or "none of them"
        given = " ".join(map(short, sorted(ours - theirs)[:3])) or "none of them"
        raise ConfigurationError(
            f"the workdir {folder} holds a run with other flags: it has {held}, this run {given}"
        )


def _holds_flags(folder: Path) -> bool:
    """Whether there are flags of a run in a folder.

    Raises:
      ConfigurationError: it is no folder, cannot be used, or holds something else.
    """
    name = f"the workdir {short(folder, 200)}"
    try:
        if folder.is_symlink() and not folder.exists():
            raise ConfigurationError(f"{name} is a link to nothing")
        if folder.exists() and not folder.is_dir():
            raise ConfigurationError(f"{name} is a file")
        if (folder / FLAGS).exists():
            return True
        other = (folder / METRICS).exists()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigurationError(f"{name} cannot be used: {why}") from None
    if other:
        raise ConfigurationError(
            f"{name} holds {METRICS} but no {FLAGS}: it is not a run of this program"
        )
    return False


def _as_line(line: dict[str, Any]) -> str:
    return json.dumps(finite(line)) + "\n"
