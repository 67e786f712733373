"""The check of a figure's file: which keys its tables have, and of which types their values are."""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from experiments.planning.options import Options
from experiments.plotting.comparison import RESULTS
from jaxlocal import ConfigurationError

SCALES = ("small", "full")
KINDS = ("curves", "ends", "plan")
MEASURED = (
    *("step", "round", "time_slots", "learning_rate", *RESULTS),
    *("consensus_distance", "bits_workers", "bits_hubs"),
)
PLANNED = ("steps", "rounds", "communication_volume", "local_steps_max", "bits_workers", "hours")
# What figures of a kind may be drawn over, besides their axes of hours, and what they may show.
# Ends are drawn over the flag that is swept, or over what their points are named by.
OVER = {"curves": (*MEASURED, "megabytes"), "plan": ("step", "hours", "communication_volume")}
SHOWN = {"curves": (*MEASURED, "megabytes"), "ends": MEASURED, "plan": ("local_steps", "curve")}


class Type(NamedTuple):
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _all(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a list of one or more such values."""
    return lambda value: isinstance(value, list) and bool(value) and all(map(holds, value))


def _named(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a table of such values."""
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def _is_span(value: Any) -> bool:
    return _all(_is_number)(value) and len(value) == 2 and 0 < value[0] < value[1]


_is_text = lambda value: isinstance(value, str) and bool(value.strip())
_is_flag = lambda value: isinstance(value, bool | str) or _is_number(value)
_is_table = lambda value: isinstance(value, dict)
TEXT = Type("a text", _is_text)
TEXTS = Type("a list of texts", lambda value: value == [] or _all(_is_text)(value))
NUMBERS = Type("a list of numbers", _all(_is_number))
NUMBER = Type("a number", _is_number)
COUNT = Type("a whole number of 1 or more", lambda v: type(v) is int and v > 0)
FLAGS = Type("a table of texts, numbers and booleans", _named(_is_flag))
GRIDS = Type("a table of lists of values", _named(_all(_is_flag)))
BY_NAME = Type("a table of numbers", _named(_is_number))
NAMES = Type("a table of texts", _named(_is_text))
TABLE = Type("a table", _is_table)
TABLES = Type("a list of tables", _all(_is_table))
TABLES_BY_NAME = Type("a table of tables", lambda v: _named(_is_table)(v) and bool(v))

_OWN = {"flags": FLAGS, "published": BY_NAME, "tune": GRIDS}
POINT = _OWN | dict.fromkeys(SCALES, TABLE)
_AT_SCALE = _OWN | {"sweep": TABLE}
_CURVE = (
    _AT_SCALE
    | {"name": TEXT, "group": TEXT, "averages": NAMES, "points": TABLES_BY_NAME}
    | dict.fromkeys(SCALES, TABLE)
)
_SWEEP = {"flag": TEXT, "values": NUMBERS, "flags": NAMES}
_LINE = {"name": TEXT, "x": NUMBERS, "y": NUMBERS}
_CLUSTER = (
    dict.fromkeys(Options._fields, NUMBER)
    | dict.fromkeys(("all_reduce", "slowdown"), TEXT)
    | {"parameters": COUNT}
)
_SCALE = {
    **{"flags": FLAGS, "tune": GRIDS, "seeds": COUNT, "cost": TEXT, "differs": TEXTS},
    "until": NUMBER,
}
_FIGURE = {
    **{"title": TEXT, "source": TEXT, "flags": FLAGS, "tune": GRIDS, "curves": TABLES},
    "kind": Type(f"one of {', '.join(KINDS)}", lambda value: value in KINDS),
    "x": Type("a text or a list of texts", lambda v: _is_text(v) or _all(_is_text)(v)),
    "y": Type("a list of texts", _all(_is_text)),
    "log": Type('"x", "y", "xy" or ""', lambda value: value in ("", "x", "y", "xy")),
    "slopes": Type("two positive numbers, the lower one first", _is_span),
    "lines": TABLES,
    "clusters": TABLES_BY_NAME,
    **dict.fromkeys(SCALES, TABLE),
}


def check_figure(name: str, table: dict[str, Any]) -> None:
    """Check the tables of a figure's file, apart from its flags.

    Raises:
      ConfigurationError: an unknown or missing key, or a value of another type.
    """
    where = f"figure {name}"
    _check(where, table, _FIGURE, ("title", "source", "x", "y", "curves"))
    if not any(scale in table for scale in SCALES):
        raise ConfigurationError(f"{where} has no scale: give a table {' or '.join(SCALES)}")
    for scale in SCALES:
        _check(f"{where}, scale {scale}", table.get(scale, {}), _SCALE)
    for curve in table["curves"]:
        _check_curve(f"{where}, curve {curve.get('name')!r}", curve)
    for line in table.get("lines", []):
        _check(f"{where}, line {line.get('name')!r}", line, _LINE, tuple(_LINE))
        if len(line["x"]) != len(line["y"]):
            count = f"{len(line['x'])} values of x and {len(line['y'])} of y"
            raise ConfigurationError(f"{where}, line {line['name']!r} has {count}")
    for axis, cluster in table.get("clusters", {}).items():
        at = f"{where}, cluster {axis!r}"
        _check(at, cluster, _CLUSTER)
        if "parameters" not in cluster:
            raise ConfigurationError(f"{at}: give the number of parameters of its model")
    _check_axes(where, table)


def _check_curve(where: str, curve: dict[str, Any]) -> None:
    _check(where, curve, _CURVE, ("name",))
    at_scales = [curve.get(scale, {}) for scale in SCALES]
    for scale, own in zip(SCALES, at_scales, strict=True):
        _check(f"{where}, scale {scale}", own, _AT_SCALE)
    for table in (curve, *at_scales):
        if "sweep" in table:
            _check(f"{where}, sweep", table["sweep"], _SWEEP, ("flag", "values"))
            if "points" in curve:
                raise ConfigurationError(f"{where} has a sweep and points; give one of them")
    for x, point in curve.get("points", {}).items():
        at = f"{where}, point {x!r}"
        _check(at, point, POINT)
        for scale in SCALES:
            _check(f"{at}, scale {scale}", point.get(scale, {}), _OWN)


def _check_axes(where: str, table: dict[str, Any]) -> None:
    """Check what a figure is drawn over, and what it shows."""
    kind = table.get("kind", "curves")
    x, y = table["x"], table["y"]
    over = [x] if isinstance(x, str) else x
    clusters = table.get("clusters", {})
    if kind == "ends" and len(over) != 1:
        raise ConfigurationError(f"{where}: ends are drawn over one x, got {over}")
    if kind != "ends":
        _check_known(f"{where}, x", over, (*OVER[kind], *clusters))
    _check_known(f"{where}, y", y, SHOWN[kind])
    if kind == "plan" and (over == ["step"]) != (y == ["local_steps"]):
        raise ConfigurationError(
            f"{where}: a plan shows local_steps over step, or curve over hours or "
            f"communication_volume, got {y} over {over}"
        )
    if "hours" in over and (alone := [c["name"] for c in table["curves"] if "group" not in c]):
        raise ConfigurationError(f"{where}, curve {alone[0]!r}: its hours follow from no group")
    if unused := [axis for axis in clusters if kind != "curves" or axis not in over]:
        raise ConfigurationError(f"{where}: nothing is drawn over the cluster {unused[0]!r}")
    shown = PLANNED if kind == "plan" else y
    for curve in table["curves"]:
        own = [
            curve,
            *(curve.get(scale, {}) for scale in SCALES),
            *curve.get("points", {}).values(),
        ]
        for published in (one.get("published", {}) for one in own):
            at = f"{where}, curve {curve['name']!r}, published"
            _check_known(at, published, shown)


def _check_known(where: str, given: Collection[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise ConfigurationError(f"{where}: {name!r} is not one of {', '.join(known)}")


def _check(
    where: str, table: dict[str, Any], types: dict[str, Type], needed: Collection[str] = ()
) -> None:
    for key, value in table.items():
        if key not in types:
            raise ConfigurationError(f"{where}: unknown key {key!r}; there are {sorted(types)}")
        if not types[key].holds(value):
            raise ConfigurationError(f"{where}: {key} must be {types[key].words}, got {value!r}")
    for key in needed:
        if key not in table:
            raise ConfigurationError(f"{where} has no {key!r}")
