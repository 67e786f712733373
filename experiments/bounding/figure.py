"""The table and the picture of the bound beside what was computed exactly and measured."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from experiments.bounding.least_squares import Compared
from experiments.plotting.figures import load_pyplot, save_figure
from experiments.running.recording import write_whole
from experiments.running.seeds import mean_and_error

COLUMNS = (
    *("graph", "zeta", "bound", "bound_start", "bound_noise", "bound_disagreement"),
    *("exact_gradient", "measured_gradient", "standard_error", "consensus_bound"),
    "exact_consensus",
)


def write_table(path: Path, found: Sequence[Compared]) -> None:
    """Write a row for each hub graph, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in found:
        measured = mean_and_error(one.measured)
        numbers = [one.zeta, one.bound.total, *one.bound, one.exact.gradient, measured["mean"]]
        numbers += [measured["error"], one.consensus_bound, one.exact.consensus]
        cells = ("" if number is None else f"{number:.6g}" for number in numbers)
        writer.writerow([one.graph, *cells])
    write_whole(path, text.getvalue())


def draw(path: Path, found: Sequence[Compared]) -> None:
    """Draw the squared gradient norm and the squared consensus distance over ζ, with the bounds."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    zeta = [one.zeta for one in found]
    below = [0.0] * len(found)
    for name in ("start", "noise", "disagreement"):
        above = [x + getattr(one.bound, name) for x, one in zip(below, found, strict=True)]
        left.fill_between(zeta, below, above, alpha=0.3, lw=0, label=f"bound: {name}")
        below = above
    left.plot(zeta, [one.exact.gradient for one in found], "k-", lw=1, label="exact expectation")
    means = [mean_and_error(one.measured) for one in found]
    values, errors = [m["mean"] for m in means], [m["error"] or 0.0 for m in means]
    left.errorbar(zeta, values, errors, fmt="o", color="tab:red", label="measured")
    left.set(xlabel="ζ of the hub network", ylabel="mean of ‖∇F(u)‖²", ylim=(0, None))
    right.plot(zeta, [one.consensus_bound for one in found], label="bound of the lemma")
    right.plot(zeta, [one.exact.consensus for one in found], "k-", lw=1, label="exact expectation")
    right.set(xlabel="ζ of the hub network", ylabel="mean of Σ a ‖x − u‖²", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left")
    for one in found:
        right.annotate(one.graph, (one.zeta, one.exact.consensus), fontsize=7, rotation=20)
    save_figure(figure, path)
