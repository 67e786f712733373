"""Figures of papers as data: files of TOML with settings and published values of every curve.

Keys of a file, of which `curves` and the two scales are tables:

- title, source, x, y: what is drawn, over what, and where it was published; y is a list. A list of
  x has panels for each, with the slopes and `until` of the first.
- kind: curves (y over x during the runs), ends (the last y of each run over a swept flag) or plan
  (of plans, without training: local_steps over step, or bars: curve over hours or
  communication_volume).
- flags: of experiments.train, shared by all curves. tune: lists of values by flag, of which each
  curve takes the best.
- small, full: what a scale changes: flags, tune, seeds, cost (a text) and differs, a list of what
  differs from the paper; until: the x at which curves are compared, by default their ends; what
  is not measured there is interpolated.
- curves: name, flags, published (values by metric), tune; of kind ends, sweep: a flag, its values
  and other flags in which {} is replaced by the value; or points: by their x, the flags, tune
  and published of each.
  averages: names of further curves by running average, ema or swa, of the same runs' models.
  group: of kind plan, curves whose hours follow from the two that have published hours.
- lines: name, x and y of lines that theory gives, drawn beside the first metric.
- clusters: by axis of x, a cluster on which the hours of the runs are modelled: parameters, of the
  model whose messages are sent there, and flags of hours of experiments.plan.
"""

import dataclasses
import math
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.building.config import Config
from experiments.building.files import read_text
from experiments.reproducing.schema import SCALES, check_figure
from experiments.tuning.settings import with_flags
from jaxlocal import ConfigurationError
from jaxlocal.errors import lookup

FOLDER = Path(__file__).parent / "figures"
# Flags that a figure may not have: it gives seeds in its scales, and the folder follows from names.
SHARED = ("seeds", "workdir")


class Curve(NamedTuple):
    """A curve, or with a sweep one of its points."""

    name: str
    config: Config
    tune: dict[str, list[Any]]  # values by flag
    published: dict[str, float]  # by metric
    sweep: tuple[str, float] | None  # the swept flag and its value
    group: str | None = None  # of curves whose hours follow from two that are known
    runs_of: str | None = None  # the curve whose runs these are, where they are not its own
    average: str | None = None  # the running average of those runs that is shown


class Line(NamedTuple):
    """A line of theory."""

    name: str
    x: list[float]
    y: list[float]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure at one scale."""

    name: str
    scale: str
    title: str
    source: str
    kind: str
    axes: tuple[str, ...]  # what y is drawn over
    y: tuple[str, ...]
    log: str  # the axes with a logarithmic scale: "", "x", "y" or "xy"
    slopes: tuple[float, float] | None  # the range of x over which slopes of log y are fitted
    seeds: int
    cost: str
    differs: tuple[str, ...]
    curves: tuple[Curve, ...]
    lines: tuple[Line, ...]
    until: float = math.inf  # the x at which curves are compared
    clusters: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # by axis

    @property
    def x(self) -> str:
        """The axis over which curves are compared and slopes are fitted."""
        return self.axes[0]


def names() -> list[str]:
    """The names of all figures."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def scales(name: str) -> list[str]:
    """The scales that a figure has."""
    table = _parsed(read_text(FOLDER / f"{name}.toml", "the figure"), name)
    return [scale for scale in SCALES if scale in table]


def read_figure(name: str, scale: str | None, base: Config) -> Figure:
    """Read the figure of a name at a scale.

    Args:
      scale: "small" or "full"; None for "small", or the only one that the figure has.
      base: of the flags that the figure does not give.

    Raises:
      ConfigurationError: the name or the scale is unknown, or the file of the figure is wrong.
    """
    path = lookup("figure", name, {known: FOLDER / f"{known}.toml" for known in names()})
    if scale is not None:
        lookup("scale", scale, dict.fromkeys(SCALES))
    return parse_figure(read_text(path, "the figure"), name, scale, base)


def parse_figure(text: str, name: str, scale: str | None, base: Config) -> Figure:
    """Read a figure from the text of its file; see `read_figure`."""
    table = _parsed(text, name)
    check_figure(name, table)
    has = [scale for scale in SCALES if scale in table]
    scale = scale or has[0]
    if scale not in table:
        others = " and ".join(has)
        raise ConfigurationError(f"figure {name} has no scale {scale!r}, only {others}")
    at = table[scale]
    shared = table.get("flags", {}) | at.get("flags", {})
    tune = table.get("tune", {}) | at.get("tune", {})
    axes = tuple([table["x"]] if isinstance(table["x"], str) else table["x"])
    curves = [
        point
        for curve in table["curves"]
        for one in _points(name, curve, scale, shared, tune, base, axes[0])
        for point in (one, *_averages(name, one, curve.get("averages", {})))
    ]
    _check_swept(name, axes[0] if table.get("kind") == "ends" else None, curves)
    _check_distinct(name, table["curves"], curves)
    slopes = table.get("slopes")
    return Figure(
        name=name,
        scale=scale,
        title=table["title"],
        source=table["source"],
        kind=table.get("kind", "curves"),
        axes=axes,
        y=tuple(table["y"]),
        log=table.get("log", ""),
        slopes=None if slopes is None else (float(slopes[0]), float(slopes[1])),
        seeds=at.get("seeds", 1),
        cost=at.get("cost", "not measured"),
        differs=tuple(at.get("differs", [])),
        curves=tuple(curves),
        lines=tuple(Line(**line) for line in table.get("lines", [])),
        until=float(at.get("until", math.inf)),
        clusters=table.get("clusters", {}),
    )


def folder_name(curve: Curve) -> str:
    """The name of a curve's folder."""
    swept = f"-{curve.sweep[0]}={curve.sweep[1]:g}" if curve.sweep else ""
    return re.sub(r"[^\w.=-]+", "_", curve.runs_of or curve.name).strip("_") + swept


def _check_swept(figure: str, x: str | None, curves: Iterable[Curve]) -> None:
    """Check that the ends of all curves are over x, whose values a sweep or points give.

    Args:
      x: None where curves are not drawn by their ends, and have no sweep.
    """
    for curve in curves:
        swept = curve.sweep and curve.sweep[0]
        if swept != x:
            where = f"figure {figure}, curve {curve.name!r}"
            has = "has no sweep or points" if swept is None else f"has a sweep of {swept}"
            wanted = 'only figures of kind "ends" have one' if x is None else f"ends are over {x}"
            raise ConfigurationError(f"{where} {has}; {wanted}")


def _check_distinct(figure: str, tables: list[dict[str, Any]], curves: Iterable[Curve]) -> None:
    """Check that no two curves have one name, and that no two runs share a folder."""
    names = [name for one in tables for name in (one["name"], *one.get("averages", {}).values())]
    folders = [folder_name(curve) for curve in curves if curve.runs_of is None]
    for what, given in (("curves are named", names), ("curves would run in the folder", folders)):
        if twice := [name for name in given if given.count(name) > 1]:
            raise ConfigurationError(f"figure {figure}: two {what} {twice[0]!r}")


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"figure {name}: {error}") from None


def _points(
    figure: str,
    curve: dict[str, Any],
    scale: str,
    shared: dict[str, Any],
    tune: dict[str, Any],
    base: Config,
    x: str,
) -> list[Curve]:
    """A curve at a scale, or the points of its sweep over x."""
    where = f"figure {figure}, curve {curve['name']!r}"
    own = curve.get(scale, {})
    flags = shared | curve.get("flags", {}) | own.get("flags", {})
    chosen = tune | curve.get("tune", {}) | own.get("tune", {})
    published = curve.get("published", {}) | own.get("published", {})
    make = lambda more: with_flags(base, _words(flags | more), where, SHARED)
    one = Curve(curve["name"], base, _typed(where, chosen), published, None, curve.get("group"))
    if "points" in curve:
        return [
            _point(where, one, (x, value), at, scale, make) for value, at in curve["points"].items()
        ]
    sweep = own.get("sweep", curve.get("sweep"))
    if sweep is None:
        return [one._replace(config=make({}))]
    flag = sweep["flag"]
    follow = lambda value: {
        name: text.replace("{}", str(value)) for name, text in sweep.get("flags", {}).items()
    }
    return [
        one._replace(config=make({flag: value} | follow(value)), sweep=(flag, value))
        for value in sweep["values"]
    ]


def _point(
    where: str,
    of: Curve,
    sweep: tuple[str, str],
    table: dict[str, Any],
    scale: str,
    make: Callable[[dict[str, Any]], Config],
) -> Curve:
    """A point of a curve that has flags of its own."""
    where, own = f"{where}, point {sweep[1]!r}", table.get(scale, {})
    try:
        swept = (sweep[0], float(sweep[1]))
    except ValueError:
        swept = (sweep[0], math.nan)
    if not math.isfinite(swept[1]):
        raise ConfigurationError(f"{where}: a point is named by its x, a number")
    joined = lambda key: table.get(key, {}) | own.get(key, {})
    return of._replace(
        config=make(joined("flags")),
        tune=of.tune | _typed(where, joined("tune")),
        published=of.published | joined("published"),
        sweep=swept,
    )


def _averages(figure: str, of: Curve, named: dict[str, str]) -> list[Curve]:
    """The curves of running averages that the runs of a curve keep."""
    where = f"figure {figure}, curve {of.name!r}"
    kept = {"ema": of.config.ema_decay, "swa": of.config.swa_start}
    for average in named:
        if lookup("running average", average, kept) is None:
            flag = {"ema": "ema_decay", "swa": "swa_start"}[average]
            raise ConfigurationError(f"{where}: its average {average!r} needs the flag {flag}")
    return [
        of._replace(name=name, published={}, runs_of=of.name, average=average)
        for average, name in named.items()
    ]


def _typed(where: str, grids: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The values of grids, as those of their flags."""
    typed = {}
    for flag, grid in grids.items():
        words = [_words({flag: value}) for value in grid]
        configs = [with_flags(Config(), word, where, (*SHARED, "seed")) for word in words]
        typed[flag] = [getattr(config, flag, None) for config in configs]
        if len(set(typed[flag])) < len(grid):
            raise ConfigurationError(f"{where}: {flag} is tuned over equal values, {grid}")
    return typed


def _words(flags: dict[str, Any]) -> list[str]:
    """Flags as words of a command line."""
    text = lambda value: str(value).lower() if isinstance(value, bool) else str(value)
    return [f"--{name}={text(value)}" for name, value in flags.items()]
