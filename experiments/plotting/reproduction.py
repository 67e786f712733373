"""The picture of a figure of a paper: curves with their published ends, or points of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.plotting.comparison import COSTS, RESULTS
from experiments.plotting.curves import band
from experiments.plotting.figures import load_pyplot, save_figure

LABELS = COSTS | RESULTS | {"round": "rounds", "rounds": "rounds", "time_slots": "time slots"}


class Drawn(NamedTuple):
    """A curve: x [points], y [seeds, points], and the published value at its end."""

    name: str
    x: list[float]
    y: list[list[float]]
    published: float | None = None


def draw(
    panels: Mapping[str, Sequence[Drawn]], x: str, log: str, marked: bool, title: str, path: Path
) -> None:
    """Draw a panel for every metric: means over seeds in a band of their standard error.

    Args:
      panels: the curves by metric.
      x: what the horizontal axis shows.
      log: the axes with a logarithmic scale, of "x" and "y".
      marked: whether points are marked, as of a sweep.
      path: of the image.
    """
    figure, axes = load_pyplot().subplots(
        1, len(panels), figsize=(6.2 * len(panels), 4.2), squeeze=False, layout="constrained"
    )
    for axis, (metric, curves) in zip(axes[0], panels.items(), strict=True):
        for number, curve in enumerate(curves):
            _draw(axis, curve, f"C{number % 10}", marked)
        axis.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(metric, metric))
        if "x" in log:
            axis.set_xscale("log")
        if "y" in log and metric != "eval_accuracy":
            axis.set_yscale("log")
        else:
            _focus(axis, curves)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(title)
    save_figure(figure, path)


def _draw(axis: Any, curve: Drawn, color: str, marked: bool) -> None:
    band(axis, curve.x, curve.y, curve.name, color)
    if marked:
        axis.plot(curve.x, np.mean(curve.y, axis=0), "o", color=color, markersize=4)
    if curve.published is not None and curve.x:
        axis.plot(curve.x[-1], curve.published, "x", color=color, markersize=8, clip_on=False)


def _focus(axis: Any, curves: Sequence[Drawn]) -> None:
    """Scale the axis so that the ends show, not only the common change at the start."""
    late = [np.mean(c.y, axis=0)[len(c.x) // 8 :] for c in curves if c.x]
    values = np.concatenate([*late, [c.published for c in curves if c.published is not None]])
    values = values[np.isfinite(values)]
    if len(values):
        margin = 0.05 * (values.max() - values.min()) + 1e-4
        axis.set_ylim(values.min() - margin, values.max() + margin)
