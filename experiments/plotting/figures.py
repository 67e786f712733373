"""Figures of matplotlib that are drawn without a display, and files of them."""

from pathlib import Path
from typing import Any


def load_pyplot() -> Any:
    """Import pyplot, which takes a second, for drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure to a file, completely or not at all, and close it."""
    part = path.with_name(path.stem + ".part" + path.suffix)
    figure.savefig(part, dpi=110)
    load_pyplot().close(figure)
    part.replace(path)
