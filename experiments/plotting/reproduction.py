"""The picture of a figure of a paper: curves with their published ends, or points of a sweep."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.plotting.comparison import COSTS, RESULTS, colors
from experiments.plotting.curves import band
from experiments.plotting.figures import load_pyplot, save_figure

LABELS = {
    **COSTS,
    **RESULTS,
    "round": "rounds",
    "local_steps": "H, steps in a round",
    "R_C": "overall compression ratio R_C",
}
_WIDTH = 80  # characters of the title in a row, of one panel


class Drawn(NamedTuple):
    """A curve: x [points], y [seeds, points], and the published value at its end."""

    name: str
    x: list[float]
    y: list[list[float]]
    published: float | None = None


class Panel(NamedTuple):
    """What a panel shows: the names of its axes, and its curves."""

    x: str
    y: str
    curves: Sequence[Drawn]


def draw(panels: Sequence[Panel], log: str, title: str, path: Path) -> None:
    """Draw panels side by side: means over seeds in a band of their standard error.

    A cross at the right end of a curve is the published value.

    Args:
      panels: the first names the curves of all.
      log: the axes with a logarithmic scale, of "x" and "y".
      path: of the image.
    """
    figure, axes = load_pyplot().subplots(
        1, len(panels), figsize=(7 * len(panels), 5), squeeze=False, layout="constrained"
    )
    palette = colors(max(len(panel.curves) for panel in panels))
    for axis, panel in zip(axes[0], panels, strict=True):
        for curve, color in zip(panel.curves, palette, strict=False):  # lines of theory come last
            _draw(axis, curve, color)
        axis.set(xlabel=LABELS.get(panel.x, panel.x), ylabel=LABELS.get(panel.y, panel.y))
        if "x" in log:
            axis.set_xscale("log", nonpositive="mask")  # step 0 has no place on it
        if "y" in log and panel.y != "eval_accuracy":
            axis.set_yscale("log")
        else:
            _focus(axis, panel.curves)
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
