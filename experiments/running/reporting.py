"""The report of a run that has ended: summary, picture, table, exported model."""

from typing import Any

import jax

import jaxlocal
from experiments.building.job import Job
from experiments.plotting.curves import plot_curves, running_averages
from experiments.plotting.display import Display, data_size, number, show_table
from experiments.running.metrics import METRICS, SUMMARY
from experiments.running.recording import CURVES, FLAGS, PARTITION, Recorder, writing
from jaxlocal import RoundFn
from jaxlocal.training.checkpoints import export
from jaxlocal.types import TrainState


def report(
    job: Job, round_fn: RoundFn, recorder: Recorder, display: Display, seconds: float, why: str
) -> None:
    """Write the summary and the picture of a run, and print a table.

    Args:
      seconds: that the run took.
      why: the reason of its end.
    """
    folder, lines = recorder.folder, recorder.lines
    title = f"{title_of(job)}, {job.method.period.description}"
    recorder.finish(_summary(job, round_fn, lines, seconds, why))
    if lines:
        with writing(folder / CURVES):
            plot_curves(lines, folder / CURVES, title)
        show_table(display.console, title, _rows(lines[-1], seconds, why))
    for name in (METRICS, SUMMARY, CURVES, PARTITION, FLAGS):
        if (folder / name).exists():
            display.note(str(folder / name))


def title_of(job: Job) -> str:
    """The title of a run in pictures and tables."""
    return f"{job.config.method} on {job.config.dataset}, {job.layout.workers} workers"


def export_model(
    round_fn: RoundFn, recorder: Recorder, display: Display, state: TrainState, name: str = ""
) -> None:
    """Write the average model of a state, for use in other programs, in a folder of a name."""
    params, model_state = round_fn.mean(state)
    for path in export(recorder.folder / "export" / name, params, model_state):
        display.note(str(path))


def _summary(
    job: Job, round_fn: RoundFn, lines: list[dict[str, Any]], seconds: float, why: str
) -> dict[str, Any]:
    accuracies = [line["eval_accuracy"] for line in lines if line["eval_accuracy"] is not None]
    return {
        "ended": why,
        **(lines[-1] if lines else {}),
        "best_eval_accuracy": max(accuracies, default=None),
        "total_seconds": round(seconds, 3),
        "method": job.config.method,
        "period": job.method.period.description,
        "dataset": job.config.dataset,
        "model": job.config.model,
        "hubs": job.layout.hubs,
        "workers": job.layout.workers,
        "zeta": job.zeta,
        "processes": jax.process_count(),
        "devices": round_fn.mesh.size,
        "backend": jax.default_backend(),
        "versions": {"jaxlocal": jaxlocal.__version__, "jax": jax.__version__},
        "flags": job.config.flag_lines(),
    }


def _rows(last: dict[str, Any], seconds: float, why: str) -> list[tuple[str, str]]:
    steps, rounds = last["step"], last["round"]
    sent = f"{data_size(last['bits_workers'])}, {data_size(last['bits_hubs'])}"
    each = f" ({steps / rounds:.1f} steps per round)" if rounds else ""
    averages = [
        (f"test loss, accuracy: {name.upper()}", _loss_and_accuracy(last, f"_{name}"))
        for name in running_averages(last)
    ]
    return [
        ("ended", why),
        ("steps, rounds", f"{number(steps)}, {number(rounds)}{each}"),
        ("train loss", number(last["train_loss"])),
        ("test loss, accuracy", _loss_and_accuracy(last)),
        *averages,
        ("sent by a worker, by a hub", sent),
        ("seconds", f"{seconds:.1f}"),
    ]


def _loss_and_accuracy(last: dict[str, Any], of: str = "") -> str:
    accuracy = last[f"eval_accuracy{of}"]
    return f"{number(last[f'eval_loss{of}'])}, {'—' if accuracy is None else f'{accuracy:.4f}'}"
