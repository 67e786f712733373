"""The picture of a figure of a paper: curves, points of a sweep or bars, with published values."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
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
    "communication_volume": "communication volume, of that of data parallelism",
}
_WIDTH = 80  # characters of the title in a row, of one panel


class Drawn(NamedTuple):
    """A curve: x [points], y [seeds, points], and published values as (x, y)."""

    name: str
    x: list[float]
    y: list[list[float]]
    published: Sequence[tuple[float, float]] = ()


class Panel(NamedTuple):
    """What a panel shows: the names of its axes, its curves, and lines that theory gives."""

    x: str
    y: str
    curves: Sequence[Drawn]
    theory: Sequence[Drawn] = ()


class Bar(NamedTuple):
    """A bar: its value, and the published one."""

    name: str
    value: float
    published: float | None


def draw(panels: Sequence[Panel], log: str, title: str, path: Path) -> None:
    """Draw panels side by side: means over seeds in a band of their standard error.

    A cross is a published value; lines of theory are dashed.

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
        for curve, color in zip(panel.curves, palette, strict=False):
            _draw(axis, curve, color)
        for line, style in zip(panel.theory, itertools.cycle(("--", ":", "-."))):
            axis.plot(line.x, line.y[0], style, color="black", label=line.name)
        axis.set(xlabel=LABELS.get(panel.x, panel.x), ylabel=LABELS.get(panel.y, panel.y))
        if "x" in log:
            axis.set_xscale("log", nonpositive="mask")  # step 0 has no place on it
        if "y" not in log:
            _focus(axis, panel.curves)
        elif panel.y == "eval_accuracy":  # logarithmic in accuracy and in error
            axis.set_yscale("logit", nonpositive="mask", one_half="0.5", use_overline=False)
            axis.yaxis.set_major_formatter(_some)
            axis.yaxis.set_minor_formatter(_some)
        else:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    place = {"loc": "outside lower center", "ncols": 2 * len(panels)}
    crosses = any(curve.published for panel in panels for curve in panel.curves)
    figure.legend(handles=_named(axes[0, 0]) + _cross() * crosses, fontsize="small", **place)
    figure.suptitle("\n".join(textwrap.wrap(title, _WIDTH * len(panels))))
    save_figure(figure, path)


def draw_bars(bars: Mapping[str, Sequence[Bar]], title: str, path: Path) -> None:
    """Draw a panel of bars for each quantity, with a cross at each published value."""
    count = len(next(iter(bars.values())))
    figure, axes = load_pyplot().subplots(
        1,
        len(bars),
        figsize=(7 * len(bars), 1.5 + 0.28 * count),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, (name, ones) in zip(axes[0], bars.items(), strict=True):
        places = range(count)
        axis.barh(places, [one.value for one in ones], color="tab:blue", alpha=0.7)
        known = [(one.published, at) for at, one in enumerate(ones) if one.published is not None]
        axis.plot([x for x, _ in known], [y for _, y in known], "kx", markersize=8)
        axis.set_yticks(places, [one.name for one in ones])
        axis.set(xlabel=LABELS.get(name, name))
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].invert_yaxis()
    if any(one.published is not None for ones in bars.values() for one in ones):
        figure.legend(handles=_cross(), fontsize="small", loc="outside lower center")
    figure.suptitle("\n".join(textwrap.wrap(title, _WIDTH * len(bars))))
    save_figure(figure, path)


def _cross() -> list[Any]:
    """The entry of a legend for published values."""
    line = load_pyplot().Line2D([], [], color="black", marker="x", linestyle="", label="published")
    return [line]


def _named(axis: Any) -> list[Any]:
    return [line for line in axis.get_lines() if not line.get_label().startswith("_")]


def _draw(axis: Any, curve: Drawn, color: Any) -> None:
    if not curve.x:  # all its runs diverged
        return
    band(axis, curve.x, curve.y, curve.name, color)
    for at in curve.published:
        axis.plot(*at, "x", color=color, markersize=9, clip_on=False, label="_published")


def _some(accuracy: float, place: int) -> str:
    """The label of an accuracy, for some of them: .99, .98, .97, .95, .9, .8, …

    >>> [_some(accuracy, 0) for accuracy in (0.98, 0.96)]
    ['0.98', '']
    """
    leading = f"{min(accuracy, 1 - accuracy):e}"[0]
    return f"{accuracy:g}" if leading in "1235" else ""


def _focus(axis: Any, curves: Sequence[Drawn]) -> None:
    """Scale the axis so that the ends show, not only the common change at the start."""
    late = [side for c in curves if c.x for side in _sides(c)]
    values = np.concatenate([*late, [y for c in curves for _, y in c.published]])
    values = values[np.isfinite(values)]
    if len(values):
        margin = 0.05 * (values.max() - values.min()) + 1e-4
        axis.set_ylim(values.min() - margin, values.max() + margin)


def _sides(curve: Drawn) -> list[np.ndarray]:
    """The edges of the band of a curve, without its first points unless there are few in all."""
    first = max(1, len(curve.x) // 8) if len(curve.x) > 4 else 0
    ys = np.array(curve.y)[:, first:]
    error = ys.std(axis=0, ddof=1) / len(ys) ** 0.5 if len(ys) > 1 else 0.0
    return [ys.mean(axis=0) - error, ys.mean(axis=0) + error]
