"""Labels of runs: the flags in which they differ."""

from collections.abc import Sequence
from pathlib import Path

from experiments.building.config import PLACE, Config
from experiments.building.files import read_text
from experiments.comparing.folders import seed_folders
from experiments.running.recording import FLAGS

LABEL = 60  # most characters of a label; where flags are longer, the names of folders are used


def labels(folders: Sequence[Path]) -> list[str]:
    """The flags in which runs differ; where these are too long or equal, the names of the folders.

    Raises:
      ConfigurationError: a folder that is not a run.
    """
    chosen = [_flags(seed_folders(folder)) for folder in folders]
    default = _named(Config().flag_lines())
    names = list(dict.fromkeys(name for flags in chosen for name in flags))
    # A flag that flags.txt does not have is a default, empty where it depends on other flags.
    full = [{name: (default | flags).get(name, "") for name in names} for flags in chosen]
    differing = [name for name in names if len({flags[name] for flags in full}) > 1]
    by_flags = [
        ", ".join(f"{name}={flags[name]}" for name in differing if flags[name]) or "default"
        for flags in full
    ]
    distinct = len(set(by_flags)) == len(by_flags) > 1
    if distinct and max(map(len, by_flags)) <= LABEL and all(chosen):
        return by_flags
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _flags(parts: Sequence[Path]) -> dict[str, str]:
    """The flags that identify a run, by name; none where flags.txt is missing."""
    path = parts[0] / FLAGS
    lines = read_text(path, "the file").splitlines() if path.exists() else []
    chosen = _named(lines)
    if len(parts) > 1 and "seed" in chosen:
        chosen["seed"] = f"{chosen['seed']}…{parts[-1].name.removeprefix('seed_')}"
    return chosen


def _named(lines: list[str]) -> dict[str, str]:
    """Flags by name, without those that do not identify a run."""
    pairs = [line.partition("=") for line in lines]
    return {name.removeprefix("--"): value for name, _, value in pairs if name not in PLACE}
