"""The picture of a figure: its panels, and the curves, points or bars that they show."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from experiments.plotting.reproduction import Bar, Drawn, Panel, draw, draw_bars
from experiments.reproducing.figure import Figure
from experiments.reproducing.results import slopes
from experiments.reproducing.running import Found
from experiments.reproducing.series import ends, over_runs


def draw_figure(figure: Figure, found: Sequence[Found], path: Path) -> None:
    """Draw the picture of a figure."""
    if figure.kind == "plan" and figure.x != "step":
        bars = {x: [_bar(one, x) for one in found] for x in figure.axes}
        draw_bars(bars, figure.title, path)
        return
    curves = {"curves": _over_runs, "ends": _over_sweep, "plan": _over_plan}[figure.kind]
    panels = [
        Panel(x, y, curves(figure, found, x, y))
        for x, y in itertools.product(figure.axes, figure.y)
    ]
    fitted = slopes(figure, found)
    named = lambda name: f"{name}, slope {fitted[name].value:.2f}" if name in fitted else name
    first = [one._replace(name=named(one.name)) for one in panels[0].curves]
    theory = [Drawn(line.name, line.x, [line.y]) for line in figure.lines]
    shown = [panels[0]._replace(curves=first, theory=theory), *panels[1:]]
    draw(shown, figure.log, figure.title, path)


def _over_runs(figure: Figure, found: Sequence[Found], x: str, y: str) -> list[Drawn]:
    drawn = []
    for one in found:
        published = one.curve.published.get(y)
        at, values = over_runs(figure, one, x, y)
        crosses = [(at[-1], published)] if at and published is not None else []
        drawn.append(Drawn(one.curve.name, at, values, crosses))
    return drawn


def _over_sweep(figure: Figure, found: Sequence[Found], x: str, y: str) -> list[Drawn]:
    drawn = []
    for name in dict.fromkeys(one.curve.name for one in found):
        ones = [one for one in found if one.curve.name == name]
        at, values = ends(figure, ones, y)
        published = [
            (value, one.curve.published.get(y)) for value, one in zip(at, ones, strict=True)
        ]
        crosses = [(value, known) for value, known in published if known is not None]
        drawn.append(Drawn(name, at, values, crosses))
    return drawn


def _over_plan(figure: Figure, found: Sequence[Found], x: str, y: str) -> list[Drawn]:
    """H over the steps of each plan."""
    drawn = []
    for one in found:
        segments = one.plan["local_steps"]
        edges = [*(s["step"] for s in segments), one.plan["steps"]]
        heights = [float(s["local_steps"]) for s in segments]
        at = [float(edge) for pair in zip(edges, edges[1:], strict=False) for edge in pair]
        drawn.append(Drawn(one.curve.name, at, [[h for h in heights for _ in range(2)]]))
    return drawn


def _bar(one: Found, name: str) -> Bar:
    return Bar(one.curve.name, float(one.plan[name]), one.curve.published.get(name))
