"""What a run leaves behind: its folder, a line per measurement, a summary."""

import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

from experiments.config import Config
from jaxlocal import ConfigurationError

METRICS, SUMMARY, FLAGS, CURVES = "metrics.jsonl", "summary.json", "flags.txt", "curves.png"
PREVIOUS = "metrics.previous.jsonl"  # of the run that a rerun replaces, until that has ended


class Recorder:
    """Writes a run's folder. The flags come first, so that no other run takes the folder for its
    own.

    Raises:
      ConfigurationError: the folder holds a run with other flags, or cannot be written.
    """

    def __init__(self, folder: Path, config: Config):
        self.folder = folder
        self.lines: list[dict[str, Any]] = []
        _check_same_run(folder, config)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / FLAGS, "\n".join(config.flag_lines()) + "\n")
            (folder / SUMMARY).unlink(missing_ok=True)
            if (folder / METRICS).exists():
                os.replace(folder / METRICS, folder / PREVIOUS)
            self._file: TextIO = (folder / METRICS).open("w")
        except OSError as error:
            raise ConfigurationError(
                f"the workdir {folder} cannot be written: {error.strerror}"
            ) from None

    def measured(self, line: dict[str, Any]) -> None:
        """One more measurement, on disk when this returns."""
        self.lines.append(line)
        self._file.write(json.dumps(finite(line)) + "\n")
        self._file.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        self._file.close()
        if summary["ended"] != "interrupted":
            (self.folder / PREVIOUS).unlink(missing_ok=True)
        write_whole(
            self.folder / SUMMARY, json.dumps(finite(summary), indent=2, ensure_ascii=False) + "\n"
        )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The measurements of a run's folder."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def finite(values: Any) -> Any:
    """The values with null for what JSON has no number for."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _check_same_run(folder: Path, config: Config) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"the workdir {folder} is a file")
    if not (folder / FLAGS).exists():
        if (folder / METRICS).exists():
            raise ConfigurationError(
                f"the workdir {folder} holds a {METRICS} but no {FLAGS}: not a run of this program"
            )
        return
    ours = _without_place(config.flag_lines())
    theirs = _without_place((folder / FLAGS).read_text(errors="replace").splitlines())
    if ours != theirs:
        its = " ".join(sorted(theirs - ours)[:3]) or "none of them"
        asked = " ".join(sorted(ours - theirs)[:3]) or "none of them"
        raise ConfigurationError(
            f"the workdir {folder} holds a run with other flags: it has {its}, this one {asked}"
        )


def _without_place(lines: list[str]) -> set[str]:
    return {line for line in lines if line and not line.startswith("--workdir=")}
