"""Pictures of one run, and of several seeds of a run."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.plotting.figures import load_pyplot, save_figure

MEGABYTE = 8e6  # bits
COLORS = {"eval_accuracy": "tab:green", "ema": "tab:purple", "swa": "tab:brown"}


def running_averages(line: dict[str, Any]) -> list[str]:
    """The running averages of the model that a measurement is of, besides the model itself.

    >>> running_averages({"eval_loss": 0.3, "eval_loss_ema": 0.2, "eval_accuracy_ema": None})
    ['ema']
    """
    return [key.removeprefix("eval_loss_") for key in line if key.startswith("eval_loss_")]


def plot_curves(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw loss and accuracy over steps and communication, H and consensus distance over steps.

    If averages wait for slow workers, also loss and accuracy over time slots.

    Args:
      lines: the measurements of a run.
      path: of the image, a .png.
    """
    costs = _costs(lines)
    figure, axes = _figure(len(costs), 3, title)
    for row, (label, x) in enumerate(costs.items()):
        _losses(axes[row, 0], x, lines, label)
        _accuracy(axes[row, 1], x, lines, label)
    _local_steps(axes[0, 2], costs["steps"], lines)
    _distance(axes[1, 2], costs["steps"], lines)
    for axis in axes[2:, 2]:
        axis.set_axis_off()
    save_figure(figure, path)


def plot_several(runs: list[list[dict[str, Any]]], path: Path, title: str) -> None:
    """Draw the mean over seeds of losses and accuracy, in a band of its standard error, over the
    same costs as `plot_curves`."""
    lines = min(runs, key=len)  # a run may have stopped early; the bands end there
    each = [_costs(run[: len(lines)]) for run in runs]
    costs = {label: np.mean([one[label] for one in each], axis=0) for label in each[0]}
    figure, axes = _figure(len(costs), 2, f"{title}: mean and standard error")
    for row, (cost, x) in enumerate(costs.items()):
        for axis, labels in zip(axes[row], _labels(lines[0]), strict=True):
            for key, name in labels.items():
                values = [[_number(line[key]) for line in run[: len(lines)]] for run in runs]
                band(axis, x.tolist(), values, name, _color(key))
        axes[row, 0].set(xlabel=cost, ylabel="loss of the average model")
        axes[row, 1].set(xlabel=cost, ylabel="test accuracy of the average model")
        for axis in axes[row]:
            axis.legend()
            axis.grid(alpha=0.3)
    save_figure(figure, path)


def band(axis: Any, x: list[float], ys: list[list[float]], label: str, color: Any = None) -> None:
    """Draw the mean of several curves [curves][len(x)], in a band of its standard error."""
    values = np.asarray(ys, float)
    mean = values.mean(axis=0)
    (line,) = axis.plot(x, mean, label=label, color=color, marker=".", markersize=4)
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        axis.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.25, lw=0)


def _costs(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What a run has cost at each measurement, by the label of an axis."""
    steps = [line["step"] for line in lines]
    slots = [line.get("time_slots", line["step"]) for line in lines]
    sent = [(line["bits_workers"] + line["bits_hubs"]) / MEGABYTE for line in lines]
    costs = {"steps": steps, "communication: MB sent by a worker and its hub": sent}
    return costs | ({"time slots": slots} if slots[-1] != steps[-1] else {})


def _figure(rows: int, columns: int, title: str) -> tuple[Any, Any]:
    size = (13 * columns / 3, 3.5 * rows)
    figure, axes = load_pyplot().subplots(rows, columns, figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure, axes


def _labels(line: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """The labels of the losses and of the accuracies of a measurement, by key."""
    tested = {"": "test"} | {f"_{name}": f"test, {name.upper()}" for name in running_averages(line)}
    losses = {f"eval_loss{of}": label for of, label in tested.items()}
    return {"train_loss": "train"} | losses, {f"eval_accuracy{of}": tested[of] for of in tested}


def _color(key: str) -> str | None:
    return COLORS.get(key, COLORS.get(key.rpartition("_")[2]))


def _losses(axis: Any, x: list[float], lines: list[dict[str, Any]], label: str) -> None:
    labels = _labels(lines[0])[0]
    values = {key: [_number(line[key]) for line in lines] for key in labels}
    _plot(axis, x, values, labels)
    positive = [v for losses in values.values() for v in losses if v > 0]
    decades = len(positive) > 1 and max(positive) > 10 * min(positive)
    axis.set(
        xlabel=label, ylabel="loss of the average model", yscale="log" if decades else "linear"
    )
    axis.legend()
    axis.grid(alpha=0.3)


def _accuracy(axis: Any, x: list[float], lines: list[dict[str, Any]], label: str) -> None:
    labels = _labels(lines[0])[1]
    values = {key: [_number(line[key]) for line in lines] for key in labels}
    axis.set(xlabel=label, ylabel="test accuracy of the average model")
    axis.grid(alpha=0.3)
    if all(value != value for value in values["eval_accuracy"]):
        axis.text(
            0.5,
            0.5,
            "a regression has no accuracy",
            ha="center",
            va="center",
            transform=axis.transAxes,
        )
        return
    _plot(axis, x, values, labels)
    if len(labels) > 1:
        axis.legend()


def _plot(
    axis: Any, x: list[float], values: dict[str, list[float]], labels: dict[str, str]
) -> None:
    for key, name in labels.items():
        axis.plot(x, values[key], marker=_marker(x), markersize=4, color=_color(key), label=name)


def _local_steps(axis: Any, steps: list[float], lines: list[dict[str, Any]]) -> None:
    axis.step(
        steps, [line["local_steps"] for line in lines], where="pre", color="tab:purple", label="H"
    )
    axis.set(xlabel="steps", ylabel="H, steps per round")
    axis.set_ylim(0, 1.15 * max(line["local_steps"] for line in lines))  # above a constant η
    axis.grid(alpha=0.3)
    right = axis.twinx()
    right.plot(
        steps, [line["learning_rate"] for line in lines], color="tab:gray", linestyle=":", label="η"
    )
    right.set(ylabel="learning rate η", ylim=(0, None))
    handles = [*axis.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axis.legend(handles, ["H", "η"], loc="center left")


def _distance(axis: Any, steps: list[float], lines: list[dict[str, Any]]) -> None:
    values = [_number(line["consensus_distance"]) for line in lines]
    axis.plot(steps, values, marker=_marker(lines), markersize=4, color="tab:red")
    axis.set(xlabel="steps", ylabel="consensus distance", ylim=(0, None))
    axis.grid(alpha=0.3)


def _marker(lines: list[Any]) -> str:
    """Dots, unless they are so many that they overlap."""
    return "." if len(lines) <= 60 else ""


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
