"""What a figure found: its table of curves with published values, and its measurements as CSV."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.plotting.comparison import COSTS, RESULTS
from experiments.reproducing.figure import Figure
from experiments.reproducing.running import Found
from experiments.reproducing.schema import MEASURED, PLANNED
from experiments.reproducing.series import column, end, ends, is_diverged
from experiments.running.seeds import mean_and_error

NAMES = RESULTS | {
    "communication_volume": "volume",
    "local_steps_max": "largest H",
    "bits_workers": "bits sent by a worker",
}
CONFIDENCE = 0.95


class Slope(NamedTuple):
    """A fitted slope of log y over log x, and half the width of its confidence interval."""

    value: float
    half_width: float | None  # None where one line through two points has none


def table(figure: Figure, found: Sequence[Found]) -> str:
    """The curves of a figure in Markdown: measured ± standard error, beside the published value."""
    tuned = _tuned_flags(found)
    swept = list(dict.fromkeys(one.curve.sweep[0] for one in found if one.curve.sweep))
    measures = _measures(figure, found)
    head = ["curve", *swept, *tuned]
    for name in measures:
        head += [NAMES.get(name, name), "published"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for one in found:
        row = [one.curve.name]
        row += [f"{one.curve.sweep[1]:g}" if one.curve.sweep else "" for _ in swept]
        row += [_tuned(one, flag) for flag in tuned]
        for name in measures:
            row += [measured(figure, one, name), _number(one.curve.published.get(name))]
        rows.append(row)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    differs = "; ".join(figure.differs) or "nothing that is known"
    seeds = f"{figure.seeds} seed{'s' * (figure.seeds > 1)}"
    about = [f"{figure.title}. {figure.source}.", "", *lines, ""]
    about += _slope_lines(figure, found)
    runs = "Planned, not trained" if figure.kind == "plan" else f"Scale {figure.scale}, {seeds}"
    over = COSTS.get(figure.x, figure.x)
    at = "" if figure.until == math.inf else f", at {figure.until:,g} {over}, interpolated"
    trials = sorted({one.curve.config.seed for one in found if one.tuned})
    chosen = f", tuned on seed {' and '.join(map(str, trials))}" if trials else ""
    about += [f"{runs}{at}{chosen}. Differs from the paper in: {differs}.", ""]
    return "\n".join(about)


def _tuned_flags(found: Sequence[Found]) -> list[str]:
    return list(dict.fromkeys(flag for one in found for flag in one.curve.tune))


def measurements(figure: Figure, found: Sequence[Found]) -> str:
    """All measurements of a figure as CSV, a line for each; of ends, only the last of each run; of
    a plan, a line for each curve."""
    file = io.StringIO()
    columns = PLANNED if figure.kind == "plan" else (*MEASURED, *figure.clusters)
    writer = csv.writer(file, lineterminator="\n")
    tuned = _tuned_flags(found)
    writer.writerow(["curve", "sweep", "seed", *(f"tuned_{flag}" for flag in tuned), *columns])
    for one in found:
        sweep = "" if one.curve.sweep is None else one.curve.sweep[1]
        if figure.kind == "plan":
            writer.writerow([one.curve.name, sweep, "", *(one.plan.get(k, "") for k in columns)])
        chosen = [one.tuned.get(flag, "") for flag in tuned]
        for seed, lines in zip(one.seeds, one.runs, strict=True):
            for line in lines[-1:] if figure.kind == "ends" else lines:
                values = [line.get(name) for name in columns]
                texts = ["" if value is None else value for value in values]
                writer.writerow([one.curve.name, sweep, seed, *chosen, *texts])
    return file.getvalue()


def measured(figure: Figure, one: Found, name: str) -> str:
    """The mean of a metric where curves are compared ± its standard error, as text."""
    if figure.kind == "plan":
        return _number(one.plan.get(name))
    if not one.runs:
        return "all diverged"
    lost = sum(map(is_diverged, one.ended))
    if lost:
        return f"{lost} of {len(one.ended)} diverged"
    values = [end(figure, lines, name) for lines in one.runs]
    if any(map(math.isnan, values)):
        return "—"
    figures = mean_and_error(values)
    error = figures["error"]
    return _number(figures["mean"]) + ("" if error is None else f" ± {error:.2g}")


def slopes(figure: Figure, found: Sequence[Found]) -> dict[str, Slope]:
    """The slope of log y over log x of each curve in the range of the figure, y its first.

    Of several seeds it is the mean of their slopes, with Student's interval over the seeds: the
    points of one run are not independent. Of one deterministic sweep it is that of the line
    through the ends, with the interval of its residuals.
    """
    if figure.slopes is None:
        return {}
    fitted: dict[str, Slope] = {}
    for name in dict.fromkeys(one.curve.name for one in found):
        fits = [_fit(x, y, figure.slopes) for x, y in _series(figure, found, name)]
        if len(fits) > 1:
            values = np.array([fit.value for fit in fits])
            student = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
            error = float(values.std(ddof=1)) / len(values) ** 0.5
            fitted[name] = Slope(float(values.mean()), student * error)
        elif fits:
            fitted[name] = fits[0]
    return fitted


def _series(
    figure: Figure, found: Sequence[Found], name: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """x and the first y of every seed of a curve; NaN where a run diverged."""
    ones, y = [one for one in found if one.curve.name == name], figure.y[0]
    if figure.kind == "ends":
        x, each = ends(figure, ones, y)
        return [(np.array(x), np.array(values)) for values in each]
    return [
        (column(lines, figure.x), column(lines, y) * (np.nan if lost else 1))
        for one in ones
        for lines, lost in zip(one.runs, map(is_diverged, one.ended), strict=True)
    ]


def _fit(x: np.ndarray, y: np.ndarray, span: tuple[float, float]) -> Slope:
    inside = (x >= span[0]) & (x <= span[1]) & (x > 0) & (y > 0)
    if inside.sum() < 2:
        return Slope(float("nan"), None)
    fit = stats.linregress(np.log10(x[inside]), np.log10(y[inside]))
    free = int(inside.sum()) - 2
    if not free:
        return Slope(float(fit.slope), None)
    student = float(stats.t.ppf((1 + CONFIDENCE) / 2, free))
    return Slope(float(fit.slope), student * float(fit.stderr))


def _slope_lines(figure: Figure, found: Sequence[Found]) -> list[str]:
    fitted = slopes(figure, found)
    if not fitted or figure.slopes is None:
        return []
    low, high = figure.slopes
    each = "; ".join(f"{name} {_slope(slope)}" for name, slope in fitted.items())
    what = f"log {NAMES.get(figure.y[0], figure.y[0])} over log {figure.x}"
    return [f"Slopes of {what} from {low:g} to {high:g}, 95 % intervals: {each}.", ""]


def _slope(slope: Slope) -> str:
    if math.isnan(slope.value):
        return "none"
    width = "" if slope.half_width is None else f" ± {slope.half_width:.2g}"
    return f"{slope.value:.3f}{width}"


def _measures(figure: Figure, found: Sequence[Found]) -> list[str]:
    if figure.kind != "plan":
        return list(figure.y)
    published = [name for one in found for name in one.curve.published]
    hours = ["hours"] if any("hours" in one.plan for one in found) else []
    return list(dict.fromkeys(["communication_volume", *hours, *published]))


def _tuned(one: Found, flag: str) -> str:
    if flag not in one.tuned:
        return ""
    value = one.tuned[flag]
    text = value if isinstance(value, str | bool) else f"{value:g}"
    return f"{text}{' (edge)' * (flag in one.at_edge)}"


def _number(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, int) or float(value).is_integer() and abs(value) >= 10:
        return f"{int(value):,}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3e}"
