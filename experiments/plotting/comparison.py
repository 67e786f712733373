"""Picture of several runs, each of one seed or of several, over their costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.plotting.curves import MEGABYTE, band
from experiments.plotting.figures import load_pyplot, save_figure

COSTS = {
    "step": "steps",
    "megabytes": "communication: MB sent by a worker and its hub",
    "wall_seconds": "seconds, with compilation",
    "time_slots": "time slots",
}
RESULTS = {"train_loss": "train loss", "eval_loss": "test loss", "eval_accuracy": "test accuracy"}
_WIDTH = 150  # characters in a row of the legend


class Curves(NamedTuple):
    """The measurements of a run, of one seed or of several, taken at the same steps."""

    label: str
    values: dict[str, np.ndarray]  # by key of the metrics, [seeds, measurements]; NaN for null

    def mean(self, key: str) -> np.ndarray:
        """Mean over the seeds of a metric, or of "megabytes"; [measurements]."""
        if key == "megabytes":
            return (self.mean("bits_workers") + self.mean("bits_hubs")) / MEGABYTE
        return self.values[key].mean(0)

    @property
    def waits(self) -> bool:
        """Whether its averages wait for slow workers, so that it takes more time slots than
        steps."""
        return bool((self.values["time_slots"] != self.values["step"]).any())

    @property
    def has_accuracy(self) -> bool:
        """Whether the run is a classification."""
        return bool(np.isfinite(self.mean("eval_accuracy")).any())


def plot_comparison(runs: Sequence[Curves], path: Path) -> None:
    """Draw losses and accuracy of runs over steps, communication and time, and over time slots if
    one of them waits."""
    results = [k for k in RESULTS if k != "eval_accuracy" or any(r.has_accuracy for r in runs)]
    costs = [k for k in COSTS if k != "time_slots" or any(r.waits for r in runs)]
    size = (13 * len(costs) / 3, 3.2 * len(results) + 1)
    figure, axes = load_pyplot().subplots(
        len(results), len(costs), figsize=size, sharey="row", layout="constrained"
    )
    for row, result in zip(axes, results, strict=True):
        for axis, cost in zip(row, costs, strict=True):
            _draw(axis, runs, cost, result)
        row[0].set_ylabel(RESULTS[result])
        _scale_results(row[0], runs, result)
    for axis, cost in zip(axes[-1], costs, strict=True):
        axis.set_xlabel(COSTS[cost])
    figure.align_ylabels()
    longest = max(len(run.label) for run in runs)
    figure.legend(
        handles=axes[0, 0].get_lines(),
        loc="outside lower center",
        ncols=max(1, min(len(runs), _WIDTH // (longest + 8))),
    )
    save_figure(figure, path)


def _draw(axis: Any, runs: Sequence[Curves], cost: str, result: str) -> None:
    for run, color in zip(runs, colors(len(runs)), strict=True):
        band(axis, run.mean(cost).tolist(), run.values[result].tolist(), run.label, color)
    if cost == "megabytes":
        sent = [run.mean(cost) for run in runs]
        ends = [x[-1] for x in sent if x[-1] > 0]
        if ends and max(ends) > 5 * min(ends):
            first = min(x[x > 0][0] for x in sent if x[-1] > 0)
            axis.set_xscale("symlog", linthresh=first)
            axis.set_xlim(0, None)
    axis.grid(alpha=0.3)


def _scale_results(axis: Any, runs: Sequence[Curves], result: str) -> None:
    """Scale the axis so that differences at the end show, not only the common fall at the start."""
    values = [run.mean(result) for run in runs]
    everything = np.concatenate(values)
    if result == "eval_accuracy":
        late = np.concatenate([v[len(v) // 8 :] for v in values])
        if np.isfinite(late).any():
            low, high = np.nanmin(late), np.nanmax(everything)
            margin = 0.05 * (high - low) + 1e-3
            axis.set_ylim(low - margin, high + margin)
    else:
        positive = everything[everything > 0]
        if len(positive) and positive.max() > 10 * positive.min():
            axis.set_yscale("log")


def colors(count: int) -> list[Any]:
    """Colors that are easy to distinguish, as far as possible."""
    import matplotlib

    if count <= 10:
        return [f"C{number}" for number in range(count)]
    return list(matplotlib.colormaps["turbo"](np.linspace(0, 1, count)))
