"""What a figure shows of its runs: x and y of every seed, and y where curves are compared."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.plotting.curves import MEGABYTE
from experiments.reproducing.figure import Figure
from experiments.reproducing.running import Found
from experiments.tuning.results import DIVERGED

Lines = list[dict[str, Any]]


def column(lines: Lines, name: str) -> np.ndarray:
    """The values of a metric, or of "megabytes"; NaN where there are none."""
    if name == "megabytes":
        return (column(lines, "bits_workers") + column(lines, "bits_hubs")) / MEGABYTE
    values = [line.get(name) for line in lines]
    return np.array([np.nan if value is None else float(value) for value in values])


def end(figure: Figure, lines: Lines, name: str) -> float:
    """A metric of a run at the x where curves are compared: at `until`, between the measurements
    around it, or without `until` at its end; NaN where the run ends before."""
    x, y = column(lines, figure.x), column(lines, name)
    if figure.until == np.inf:
        return float(y[-1])
    return float(np.interp(figure.until, x, y, right=np.nan))


def over_runs(figure: Figure, one: Found, x: str, y: str) -> tuple[list[float], list[list[float]]]:
    """x, and y of every seed there, up to where curves are compared.

    Where seeds are measured at other x, all are interpolated at those of the first.
    """
    if not one.runs:
        return [], []
    columns = [(column(lines, x), column(lines, y)) for lines in one.runs]
    last = min(float(at[-1]) for at, _ in columns)
    last = min(last, figure.until) if x == figure.x else last
    grid = columns[0][0]
    grid = grid[grid < last].tolist() + [last]
    return grid, [np.interp(grid, at, values).tolist() for at, values in columns]


def ends(figure: Figure, ones: Sequence[Found], name: str) -> tuple[list[float], list[list[float]]]:
    """The swept values of a curve, and the last of a metric by seed; NaN where a run diverged."""
    seeds = range(max(len(one.runs) for one in ones))
    x = [one.curve.sweep[1] for one in ones if one.curve.sweep]
    return x, [[_end(figure, one, seed, name) for one in ones] for seed in seeds]


def _end(figure: Figure, one: Found, seed: int, name: str) -> float:
    lost = not one.runs or is_diverged(one.ended[seed])
    return float("nan") if lost else end(figure, one.runs[seed], name)


def is_diverged(ended: str) -> bool:
    """Whether a run diverged, by why it ended."""
    return ended.startswith(DIVERGED)
