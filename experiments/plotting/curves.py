"""The picture of a run, and of several seeds of one."""

from pathlib import Path
from typing import Any

import numpy as np

MEGABYTE = 8e6  # bits


def plot_curves(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and accuracy over steps and over communication, H over steps, and consensus distance."""
    figure, axes = _figure(2, 3, title)
    steps = [line["step"] for line in lines]
    said = [(line["bits_workers"] + line["bits_hubs"]) / MEGABYTE for line in lines]
    for row, (x, label) in enumerate(
        [(steps, "steps"), (said, "communication: MB sent by a worker and its hub")]
    ):
        _losses(axes[row, 0], x, lines, label)
        _accuracy(axes[row, 1], x, lines, label)
    _local_steps(axes[0, 2], steps, lines)
    _distance(axes[1, 2], steps, lines)
    _save(figure, path)


def plot_several(runs: list[list[dict[str, Any]]], path: Path, title: str) -> None:
    """Losses and accuracy of the average model over steps and over communication: the mean of the
    seeds, with a band of its standard error."""
    figure, axes = _figure(2, 2, f"{title}: mean and standard error")
    lines = min(runs, key=len)  # a run may have stopped early; bands end where the first does
    said = [(line["bits_workers"] + line["bits_hubs"]) / MEGABYTE for line in lines]
    labels = ("steps", "communication: MB sent by a worker and its hub")
    for row, x in enumerate(([line["step"] for line in lines], said)):
        for key, name, column in (
            ("train_loss", "train", 0),
            ("eval_loss", "test", 0),
            ("eval_accuracy", "test", 1),
        ):
            values = [[_number(line[key]) for line in run[: len(lines)]] for run in runs]
            color = "tab:green" if column else None
            band(axes[row, column], x, values, name, color)
        axes[row, 0].set(xlabel=labels[row], ylabel="loss of the average model")
        axes[row, 1].set(xlabel=labels[row], ylabel="test accuracy of the average model")
        axes[row, 0].legend()
        for axis in axes[row]:
            axis.grid(alpha=0.3)
    _save(figure, path)


def band(axis: Any, x: list[float], ys: list[list[float]], label: str, color: Any = None) -> None:
    """The mean of several curves [curves][len(x)], in a band of one standard error of it."""
    values = np.asarray(ys, float)
    mean = values.mean(axis=0)
    (line,) = axis.plot(x, mean, label=label, color=color, marker=".", markersize=4)
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        axis.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.25, lw=0)


def _figure(rows: int, columns: int, title: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (13 * columns / 3, 3.5 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    part = path.with_name(path.stem + ".part.png")
    figure.savefig(part, dpi=110)
    plt.close(figure)
    part.replace(path)


def _losses(axis: Any, x: list[float], lines: list[dict[str, Any]], label: str) -> None:
    values = {
        name: [_number(line[key]) for line in lines]
        for key, name in (("train_loss", "train"), ("eval_loss", "test"))
    }
    for name, losses in values.items():
        axis.plot(x, losses, marker=_marker(lines), markersize=4, label=name)
    positive = [v for losses in values.values() for v in losses if v > 0]
    decades = len(positive) > 1 and max(positive) > 10 * min(positive)
    axis.set(
        xlabel=label, ylabel="loss of the average model", yscale="log" if decades else "linear"
    )
    axis.legend()
    axis.grid(alpha=0.3)


def _accuracy(axis: Any, x: list[float], lines: list[dict[str, Any]], label: str) -> None:
    values = [_number(line["eval_accuracy"]) for line in lines]
    axis.set(xlabel=label, ylabel="test accuracy of the average model")
    axis.grid(alpha=0.3)
    if all(value != value for value in values):
        axis.text(
            0.5,
            0.5,
            "a regression has no accuracy",
            ha="center",
            va="center",
            transform=axis.transAxes,
        )
    else:
        axis.plot(x, values, marker=_marker(lines), markersize=4, color="tab:green")


def _local_steps(axis: Any, steps: list[int], lines: list[dict[str, Any]]) -> None:
    axis.step(
        steps, [line["local_steps"] for line in lines], where="pre", color="tab:purple", label="H"
    )
    axis.set(xlabel="steps", ylabel="H, steps of a round")
    axis.set_ylim(0, 1.15 * max(line["local_steps"] for line in lines))  # above a constant η
    axis.grid(alpha=0.3)
    right = axis.twinx()
    right.plot(
        steps, [line["learning_rate"] for line in lines], color="tab:gray", linestyle=":", label="η"
    )
    right.set(ylabel="learning rate η", ylim=(0, None))
    handles = [*axis.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axis.legend(handles, ["H", "η"], loc="center left")


def _distance(axis: Any, steps: list[int], lines: list[dict[str, Any]]) -> None:
    values = [_number(line["consensus_distance"]) for line in lines]
    axis.plot(steps, values, marker=_marker(lines), markersize=4, color="tab:red")
    axis.set(xlabel="steps", ylabel="consensus distance", ylim=(0, None))
    axis.grid(alpha=0.3)


def _marker(lines: list[dict[str, Any]]) -> str:
    """Dots where there are few enough to be told apart."""
    return "." if len(lines) <= 60 else ""


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
