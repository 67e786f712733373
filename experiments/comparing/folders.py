"""The folders of a run: one, or one for each of its seeds."""

from pathlib import Path

from experiments.building.files import short
from experiments.running.metrics import METRICS, SUMMARY, read_summary
from jaxlocal import ConfigurationError


def seed_folders(folder: Path) -> list[Path]:
    """The folders of the seeds of a run: the folder itself, or its subfolders seed_*.

    If any of the seeds has ended, those that have not are left out.
    """
    parts = _parts(folder)
    return [part for part in parts if (part / SUMMARY).exists()] or parts


def _parts(folder: Path) -> list[Path]:
    if (folder / METRICS).exists():
        return [folder]
    if not folder.is_dir():
        raise ConfigurationError(f"there is no folder {folder}")
    parts = [path.parent for path in folder.glob(f"seed_*/{METRICS}")]
    if not parts:
        raise ConfigurationError(f"{folder} is not a run: it holds neither {METRICS} nor seed_*")
    return sorted(parts, key=lambda part: (len(part.name), part.name))


def unfinished(folder: Path) -> dict[Path, str]:
    """The seeds of a run that have not finished, each with the reason."""
    reasons = {}
    for path in _parts(folder):
        summary = read_summary(path)
        ended = short(summary["ended"]) if summary else "still running, or it was killed"
        if ended != "finished":
            reasons[path] = ended
    return reasons
