"""The picture of a figure of a paper: curves with their published ends, or points of a sweep."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.plotting.comparison import COSTS, RESULTS, colors
from experiments.plotting.curves import band
from experiments.plotting.figures import load_pyplot, save_figure

LABELS = COSTS | RESULTS | {"round": "rounds", "local_steps": "H, steps in a round"}
_WIDTH = 80  # characters of the title in a row, of one panel


class Drawn(NamedTuple):
    """A curve: x [points], y [seeds, points], and the published value at its end."""

    name: str
    x: list[float]
    y: list[list[float]]
    published: float | None = None


def draw(panels: Mapping[str, Sequence[Drawn]], x: str, log: str, title: str, path: Path) -> None:
    """Draw a panel for every metric: means over seeds in a band of their standard error.

    A cross at the right end of a curve is the published value.

    Args:
      panels: the curves by metric.
      x: what the horizontal axis shows.
      log: the axes with a logarithmic scale, of "x" and "y".
      path: of the image.
    """
    figure, axes = load_pyplot().subplots(
        1, len(panels), figsize=(7 * len(panels), 5), squeeze=False, layout="constrained"
    )
    for axis, (metric, curves) in zip(axes[0], panels.items(), strict=True):
        for curve, color in zip(curves, colors(len(curves)), strict=True):
            _draw(axis, curve, color)
        axis.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(metric, metric))
        if "x" in log:
            axis.set_xscale("log")
        if "y" in log and metric != "eval_accuracy":
            axis.set_yscale("log")
        else:
            _focus(axis, curves)
        axis.grid(alpha=0.3)
    place = {"loc": "outside lower center", "ncols": 2 * len(panels)}
    figure.legend(handles=_named(axes[0, 0]), fontsize="small", **place)
    figure.suptitle("\n".join(textwrap.wrap(title, _WIDTH * len(panels))))
    save_figure(figure, path)


def _named(axis: Any) -> list[Any]:
    return [line for line in axis.get_lines() if not line.get_label().startswith("_")]


def _draw(axis: Any, curve: Drawn, color: Any) -> None:
    band(axis, curve.x, curve.y, curve.name, color)
    if curve.published is not None and curve.x:
        at = (curve.x[-1], curve.published)
        axis.plot(*at, "x", color=color, markersize=9, clip_on=False, label="_published")


def _focus(axis: Any, curves: Sequence[Drawn]) -> None:
    """Scale the axis so that the ends show, not only the common change at the start."""
    late = [np.mean(c.y, axis=0)[len(c.x) // 8 :] for c in curves if c.x]
    values = np.concatenate([*late, [c.published for c in curves if c.published is not None]])
    values = values[np.isfinite(values)]
    if len(values):
        margin = 0.05 * (values.max() - values.min()) + 1e-4
        axis.set_ylim(values.min() - margin, values.max() + margin)
