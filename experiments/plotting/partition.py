"""Picture of a partition: which examples the workers hold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.plotting.figures import load_pyplot, save_figure
from jaxlocal.data import Batches

WRITTEN = 12  # most workers and classes for which the picture shows the counts as numbers
LABELLED = 20  # most classes for which the axis has the number of each


def plot_partition(
    path: Path, targets: NDArray, batches: Batches, classes: int, title: str
) -> None:
    """Draw the number of examples of each worker, and of each worker and class.

    They are the examples that a worker holds; where workers hold none for the whole run, those that
    it takes in the first epoch. A regression has no classes: only the sizes are drawn.

    Args:
      path: of the image, a .png.
      targets: [examples] labels.
      classes: 0 for a regression.
    """
    grid = batches.shard_sizes.shape
    shards = batches.shards or _first_epoch(batches)
    figure, axes = _figure(len(shards), classes)
    figure.suptitle(f"{title}: examples {'held' if batches.shards else 'taken in the first epoch'}")
    _sizes(axes[0], [len(shard) for shard in shards])
    if classes:
        counts = [np.bincount(targets[shard], minlength=classes) for shard in shards]
        _classes(figure, axes[1], np.stack(counts, axis=1))
    _workers(axes, *grid)
    save_figure(figure, path)


def _figure(workers: int, classes: int) -> tuple[Any, list[Any]]:
    width = float(np.clip(0.5 * workers, 7, 13))
    heights = [1.8, float(np.clip(0.4 * classes, 2, 7))] if classes else [1.8]
    figure, axes = load_pyplot().subplots(
        len(heights),
        figsize=(width, 0.8 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    return figure, list(axes[:, 0])


def _first_epoch(batches: Batches) -> list[NDArray]:
    taken = batches.indices(0, batches.epoch_steps)
    workers = taken.reshape(len(taken), batches.shard_sizes.size, -1).swapaxes(0, 1)
    return [examples.ravel() for examples in workers]


def _sizes(axis: Any, sizes: Sequence[int]) -> None:
    bars = axis.bar(range(len(sizes)), sizes, width=0.8, color="tab:gray")
    if len(sizes) <= WRITTEN:
        axis.bar_label(bars, fontsize=8)
        axis.margins(y=0.2)
    axis.set(ylabel="examples")
    axis.grid(axis="y", alpha=0.3)


def _classes(figure: Any, axis: Any, counts: NDArray) -> None:
    """Draw counts [classes, workers] as colours, and as numbers where they fit."""
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    # The colour follows the root of a count, so that few examples look different from none.
    norm = PowerNorm(0.5, vmin=0, vmax=max(1, counts.max()))
    image = axis.imshow(counts, norm=norm, cmap="Blues", aspect="auto", interpolation="nearest")
    whole = MaxNLocator(6, integer=True)
    figure.colorbar(image, ax=axis, label="examples", pad=0.01, ticks=whole)
    axis.set(ylabel="class")
    if len(counts) <= LABELLED:
        axis.set_yticks(range(len(counts)))
    if max(counts.shape) <= WRITTEN:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if norm(count) > 0.6 else "black"
            axis.text(column, row, count or "", ha="center", va="center", color=color, fontsize=8)


def _workers(axes: Sequence[Any], hubs: int, per_hub: int) -> None:
    """Draw the axis of workers, with lines between hubs of several workers."""
    from matplotlib.ticker import MaxNLocator

    several = hubs > 1 and per_hub > 1
    for axis in axes if several else ():
        for hub in range(1, hubs):
            axis.axvline(hub * per_hub - 0.5, color="black", linewidth=0.8)
    label = f"worker, {hubs} hubs of {per_hub}" if several else "worker"
    axes[-1].set(xlabel=label, xlim=(-0.5, hubs * per_hub - 0.5))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
