"""Results of tuning: the figures of a setting, and the table of all settings."""

import math
from typing import Any

from experiments.running.seeds import mean_and_error

FIGURES = ("eval_accuracy", "eval_loss", "train_loss")
DIVERGED = "diverged"


def rank(summary: dict[str, Any]) -> tuple[float, float]:
    """Rank of a run, larger is better: by accuracy, then by loss; a diverged run is last.

    >>> one = {"ended": "finished", "eval_accuracy": 0.9, "eval_loss": 0.3}
    >>> rank(one), rank({**one, "ended": "diverged: a model is not finite"})
    ((0.9, -0.3), (-inf, -inf))
    """
    loss, accuracy = summary.get("eval_loss"), summary.get("eval_accuracy")
    if diverged(summary) or loss is None:
        return -math.inf, -math.inf
    return 0.0 if accuracy is None else accuracy, -loss


def diverged(summary: dict[str, Any]) -> bool:
    """Whether a run diverged, by its summary."""
    return summary["ended"].startswith(DIVERGED)


def figures_of(
    planned: dict[str, Any],
    trials: dict[float, dict[str, Any]],
    best: float | None,
    runs: dict[int, dict[str, Any]],
) -> dict[str, Any]:
    """The figures of one setting.

    Args:
      planned: as of `planning.figures.plan_figures`.
      trials: summaries by learning rate.
      best: the learning rate of the runs; None where all trials diverged.
      runs: summaries by seed.
    """
    ended = [summary for summary in runs.values() if not diverged(summary)]
    figures = {
        name: mean_and_error([summary[name] for summary in ended])
        for name in FIGURES
        if ended and all(summary[name] is not None for summary in ended)
    }
    kept = ("ended", *FIGURES, "total_seconds")
    short = lambda summary: {name: summary.get(name) for name in kept}
    sent = ("compression_ratio_formula", "compression_ratio_counted", "bits_workers")
    return {
        **{name: planned[name] for name in sent},
        "best_learning_rate": best,
        "at_edge": len(trials) > 1 and best in (min(trials), max(trials)),
        **figures,
        "diverged": len(runs) - len(ended),
        "tuning": [{"learning_rate": rate, **short(s)} for rate, s in trials.items()],
        "runs": [{"seed": seed, **short(s)} for seed, s in runs.items()],
    }


def markdown(settings: dict[str, dict[str, Any]]) -> str:
    """The table of the settings, in Markdown."""
    accuracy = any("eval_accuracy" in figures for figures in settings.values())
    measure = "eval_accuracy" if accuracy else "eval_loss"
    head = ["setting", "R_C by formula", "R_C counted", "best learning rate"]
    head += ["test accuracy" if accuracy else "test loss", "train loss", "MB sent by a worker"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    rows += [_row(name, figures, measure) for name, figures in settings.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(name: str, figures: dict[str, Any], measure: str) -> list[str]:
    best, count = figures["best_learning_rate"], len(figures["runs"])
    rate = "—" if best is None else f"{best:g}{' (edge)' * figures['at_edge']}"
    lost = figures["diverged"]
    note = f" ({lost} of {count} diverged)" if lost and lost < count else ""
    ratios = [figures[f"compression_ratio_{by}"] for by in ("formula", "counted")]
    return [
        name,
        *("—" if ratio is None else f"{ratio:.4g}" for ratio in ratios),
        rate,
        _mean(figures, measure) + note,
        _mean(figures, "train_loss"),
        f"{figures['bits_workers'] / 8e6:.4g}",
    ]


def _mean(figures: dict[str, Any], name: str) -> str:
    if name not in figures:
        return DIVERGED if figures["best_learning_rate"] is None or figures["diverged"] else "—"
    mean, error = figures[name]["mean"], figures[name]["error"]
    return f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}")
