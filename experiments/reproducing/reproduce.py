"""Reproduce one figure: run, and write its measurements, its table and its picture."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.building.config import Config
from experiments.launching.starting import start
from experiments.plotting.curves import MEGABYTE
from experiments.plotting.reproduction import Drawn, Panel, draw
from experiments.reproducing.figure import Figure, names, read_figure, scales
from experiments.reproducing.results import measurements, slopes, table
from experiments.reproducing.running import Found, configs, run_figure
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


def draw_figure(figure: Figure, found: Sequence[Found], path: Path) -> None:
    """Draw the picture of a figure."""
    curves = {"curves": _over_runs, "ends": _over_sweep, "plan": _over_plan}[figure.kind]
    panels = [
        Panel(x, y, curves(figure, found, x, y))
        for x, y in itertools.product(figure.axes, figure.y)
    ]
    fitted = slopes(figure, found)
    named = lambda name: f"{name}, slope {fitted[name].value:.2f}" if name in fitted else name
    first = [one._replace(name=named(one.name)) for one in panels[0].curves]
    first += [Drawn(line.name, line.x, [line.y]) for line in figure.lines]
    draw([panels[0]._replace(curves=first), *panels[1:]], figure.log, figure.title, path)


def _over_runs(figure: Figure, found: Sequence[Found], axis: str, metric: str) -> list[Drawn]:
    drawn = []
    for one in found:
        shown = [figure.shown(lines) for lines in one.runs]
        length = min(map(len, shown))
        runs = [lines[:length] for lines in shown]
        x = [_value(line, axis) for line in runs[0]]
        y = [[_value(line, metric) for line in lines] for lines in runs]
        drawn.append(Drawn(one.curve.name, x, y, one.curve.published.get(metric)))
    return drawn


def _over_sweep(figure: Figure, found: Sequence[Found], axis: str, metric: str) -> list[Drawn]:
    drawn = []
    for name in dict.fromkeys(one.curve.name for one in found):
        ones = [one for one in found if one.curve.name == name]
        x = [one.curve.sweep[1] for one in ones if one.curve.sweep]
        seeds = range(len(ones[0].runs))
        y = [[_value(one.runs[seed][-1], metric) for one in ones] for seed in seeds]
        drawn.append(Drawn(name, x, y))
    return drawn


def _over_plan(figure: Figure, found: Sequence[Found], axis: str, metric: str) -> list[Drawn]:
    """H over the steps of each plan."""
    drawn = []
    for one in found:
        segments = one.plan["local_steps"]
        edges = [*(s["step"] for s in segments), one.plan["steps"]]
        heights = [float(s["local_steps"]) for s in segments]
        x = [float(edge) for pair in zip(edges, edges[1:], strict=False) for edge in pair]
        drawn.append(Drawn(one.curve.name, x, [[h for h in heights for _ in range(2)]]))
    return drawn


def _value(line: dict[str, Any], name: str) -> float:
    if name == "megabytes":
        return (line["bits_workers"] + line["bits_hubs"]) / MEGABYTE
    value = line.get(name)
    return float("nan") if value is None else float(value)
