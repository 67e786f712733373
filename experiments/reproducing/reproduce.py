"""Reproduce one figure: run, and write its measurements, its table and its picture."""

import sys
from pathlib import Path

from experiments.building.config import Config
from experiments.launching.starting import start
from experiments.reproducing.figure import names, read_figure, scales
from experiments.reproducing.picture import draw_figure
from experiments.reproducing.results import measurements, table
from experiments.reproducing.running import configs, run_figure
from experiments.running.locking import locked
from experiments.running.recording import write_whole, writing
from experiments.tuning.runs import Stopped

CSV, TABLE, PICTURE = "figure.csv", "figure.md", "figure.png"


def reproduce(
    name: str, scale: str | None, folder: Path | None, data_dir: str | None, jobs: int
) -> int:
    """Run a figure and write its files; returns the exit status.

    Args:
      name: of the figure.
      scale: "small" or "full"; None for "small", or the only one that the figure has.
      folder: of everything that is written; by default runs/reproduce/NAME-SCALE.
      data_dir: of the datasets.
      jobs: runs at once, each in a process.

    Raises:
      ConfigurationError: an unknown figure or scale, data that are not prepared, or flags that do
        not fit, all before the first run.
    """
    figure = read_figure(name, scale, Config(data_dir=data_dir))
    start(configs(figure), jobs)
    folder = folder or Path("runs") / "reproduce" / f"{name}-{figure.scale}"
    with locked(folder):
        try:
            found = run_figure(figure, folder, jobs)
        except Stopped as stopped:
            print(f"error: {stopped.sentence}", file=sys.stderr)
            return stopped.status
        write_whole(folder / CSV, measurements(figure, found))
        write_whole(folder / TABLE, table(figure, found))
        with writing(folder / PICTURE):
            draw_figure(figure, found, folder / PICTURE)
    print(table(figure, found), *(folder / file for file in (CSV, TABLE, PICTURE)), sep="\n")
    return 0


def list_figures() -> str:
    """The names of all figures, what each shows, and its cost at both scales."""
    lines = []
    for name in names():
        at = [read_figure(name, scale, Config()) for scale in scales(name)]
        costs = "; ".join(f"{figure.scale}: {figure.cost}" for figure in at)
        lines.append(f"{name}\n    {at[0].title}. {at[0].source}.\n    {costs}")
    return "\n".join(lines)
