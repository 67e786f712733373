"""The picture of several runs, each of one seed or of many, over what they cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.plotting.curves import MEGABYTE, band

COSTS = {
    "step": "steps",
    "megabytes": "communication: MB sent by a worker and its hub",
    "wall_seconds": "seconds, with compilation",
}
RESULTS = {"train_loss": "train loss", "eval_loss": "test loss", "eval_accuracy": "test accuracy"}
_WIDTH = 150  # characters of a legend's row


class Curves(NamedTuple):
    """A run's measurements, of one seed or of several, that were taken at the same steps."""

    label: str
    values: dict[str, np.ndarray]  # by key of the metrics, [seeds, measurements]; NaN for null

    def mean(self, key: str) -> np.ndarray:
        """[measurements], over seeds."""
        if key == "megabytes":
            return (self.mean("bits_workers") + self.mean("bits_hubs")) / MEGABYTE
        return self.values[key].mean(0)

    @property
    def has_accuracy(self) -> bool:
        return bool(np.isfinite(self.mean("eval_accuracy")).any())


def plot_comparison(runs: Sequence[Curves], path: Path) -> None:
    """Losses and accuracy over steps, communication and time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = [k for k in RESULTS if k != "eval_accuracy" or any(r.has_accuracy for r in runs)]
    figure, axes = plt.subplots(
        len(results), 3, figsize=(13, 3.2 * len(results) + 1), sharey="row", layout="constrained"
    )
    for row, result in zip(axes, results, strict=True):
        for axis, cost in zip(row, COSTS, strict=True):
            _draw(axis, runs, cost, result)
        row[0].set_ylabel(RESULTS[result])
        _scale_results(row[0], runs, result)
    for axis, name in zip(axes[-1], COSTS.values(), strict=True):
        axis.set_xlabel(name)
    figure.align_ylabels()
    longest = max(len(run.label) for run in runs)
    figure.legend(
        handles=axes[0, 0].get_lines(),
        loc="outside lower center",
        ncols=max(1, min(len(runs), _WIDTH // (longest + 8))),
    )
    part = path.with_name(path.stem + ".part" + path.suffix)
    figure.savefig(part, dpi=110)
    plt.close(figure)
    part.replace(path)


def _draw(axis: Any, runs: Sequence[Curves], cost: str, result: str) -> None:
    for run, color in zip(runs, _colors(len(runs)), strict=True):
        band(axis, run.mean(cost).tolist(), run.values[result].tolist(), run.label, color)
    if cost == "megabytes":
        said = [run.mean(cost) for run in runs]
        ends = [x[-1] for x in said if x[-1] > 0]
        if ends and max(ends) > 5 * min(ends):
            first = min(x[x > 0][0] for x in said if x[-1] > 0)
            axis.set_xscale("symlog", linthresh=first)
            axis.set_xlim(0, None)
    axis.grid(alpha=0.3)


def _scale_results(axis: Any, runs: Sequence[Curves], result: str) -> None:
    """Show the differences at the end rather than the fall from the start, which all runs share."""
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


def _colors(count: int) -> list[Any]:
    """Colors that can be told apart, as far as there are so many."""
    import matplotlib

    if count <= 10:
        return [f"C{number}" for number in range(count)]
    return list(matplotlib.colormaps["turbo"](np.linspace(0, 1, count)))
