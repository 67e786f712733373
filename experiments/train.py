"""Train one model on many workers that rarely talk.

Without flags: Local SGD with the quadratic synchronization rule, 8 workers, a small CNN on
scikit-learn's digits. `python -m experiments.plan` takes the same flags and says beforehand what a
run would do and say.
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxlocal
from experiments.build import Job, build_job, make_round_fn, measure_every
from experiments.config import (
    FAILED,
    INTERRUPTED,
    Config,
    default_workdir,
    define_flags,
    run_binary,
)
from experiments.display import Display, data_size, number, show_table
from experiments.plots import plot_curves
from experiments.recording import CURVES, FLAGS, METRICS, SUMMARY, Recorder
from jaxlocal import ConfigurationError, RoundFn
from jaxlocal.data import make_batches
from jaxlocal.models.supervised import evaluation_metrics
from jaxlocal.evaluation import Evaluation
from jaxlocal.training import Diverged, Step, run, schedule


def train(config: Config) -> int:
    """Run a config to its end, leaving its folder behind; returns the exit status."""
    job = build_job(config)
    if job.dataset is None or job.model is None:
        raise ConfigurationError(
            f"--parameters={config.parameters} is for experiments.plan; training needs a model"
        )
    next(schedule(job.rounds, job.ticks))
    training, test = job.dataset.train(), job.dataset.test()
    targets, grid = training["targets"], job.layout.shape
    batches = make_batches(config.partition, targets, *grid, config.batch_size, config.seed)
    round_fn = make_round_fn(job, training)
    params, model_state = jax.jit(job.model.init)(jax.random.key(config.seed))
    state = round_fn.init(params, jax.random.key(config.seed), model_state)
    measure = Measure(job, round_fn, test)
    folder = Path(config.workdir) if config.workdir else default_workdir(config)
    recorder, display = Recorder(folder, config), Display(job.ticks)
    if round_fn.mesh.size < jax.device_count():
        display.say(
            f"{grid[0]} hubs × {grid[1]} workers divide over {round_fn.mesh.size} of the "
            f"{jax.device_count()} devices; the others stay idle"
        )
    steps = run(round_fn, state, batches.indices, job.ticks, measure_every(job))
    status, why = _follow(steps, config, measure, recorder, display)
    _leave(job, round_fn, recorder, display, measure, why)
    if status:
        print(f"error: {why}", file=sys.stderr)
    return status


def _follow(
    steps: Iterator[Step], config: Config, measure: "Measure", recorder: Recorder, display: Display
) -> tuple[int, str]:
    """Take the steps to their end; returns the exit status and how it ended."""
    enough = -math.inf if config.stop_train_loss is None else config.stop_train_loss
    try:
        with display.live():
            for step in steps:
                line = measure(step) if step.due else None
                if line:
                    recorder.measured(line)
                display.step(step, line)
                loss = line["train_loss"] if line else math.inf
                if line and not math.isfinite(loss):
                    return (
                        FAILED,
                        f"diverged: the average model's loss is {loss} at tick {step.tick}",
                    )
                if loss < enough:
                    return 0, f"training loss {loss:.4g} < {enough:g}"
    except Diverged as error:
        return FAILED, f"diverged: {error}"
    except KeyboardInterrupt:
        return INTERRUPTED, "interrupted"
    return 0, "finished"


class Measure:
    """Turns a step that is due into a metrics line."""

    def __init__(self, job: Job, round_fn: RoundFn, test: dict[str, np.ndarray]):
        assert job.dataset is not None and job.model is not None
        metrics = evaluation_metrics(job.model, job.dataset.normalize, job.dataset.classes)
        wanted, have = job.config.train_eval_examples, job.dataset.train_examples
        sample = np.random.default_rng(job.config.seed).permutation(have)[: wanted or have]
        self._job, self._start = job, time.perf_counter()
        self._train = Evaluation(round_fn, metrics, examples=np.sort(sample))
        self._test = Evaluation(round_fn, metrics, test)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def __call__(self, step: Step) -> dict[str, Any]:
        test = self._test(step.state)
        return {
            "tick": step.tick,
            "round": step.round,
            "wall_seconds": round(self.seconds, 3),
            "train_loss": self._train(step.state)["loss"],
            "eval_loss": test["loss"],
            "eval_accuracy": test.get("accuracy"),
            "learning_rate": self._job.learning_rate(max(0, step.tick - 1)),
            "local_steps": step.local_steps,
            "consensus_distance": step.distance,
            "bits_workers": step.messages.workers,
            "bits_hubs": step.messages.hubs,
        }


def _leave(
    job: Job, round_fn: RoundFn, recorder: Recorder, display: Display, measure: Measure, why: str
) -> None:
    """Summary, picture and table of what was measured."""
    folder, lines = recorder.folder, recorder.lines
    what = f"{job.config.method} on {job.config.dataset}, {job.layout.workers} workers"
    title = f"{what}, {job.rounds.period.description}"
    recorder.finish(_summary(job, round_fn, lines, measure.seconds, why))
    if lines:
        plot_curves(lines, folder / CURVES, title)
        show_table(display.console, title, _rows(lines[-1], measure.seconds, why))
    for name in (METRICS, SUMMARY, CURVES, FLAGS):
        if (folder / name).exists():
            display.say(str(folder / name))


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
        "period": job.rounds.period.description,
        "dataset": job.config.dataset,
        "model": job.config.model,
        "hubs": job.layout.hubs,
        "workers": job.layout.workers,
        "zeta": job.zeta,
        "devices": round_fn.mesh.size,
        "backend": jax.default_backend(),
        "versions": {"jaxlocal": jaxlocal.__version__, "jax": jax.__version__},
        "flags": job.config.flag_lines(),
    }


def _rows(last: dict[str, Any], seconds: float, why: str) -> list[tuple[str, str]]:
    ticks, rounds, accuracy = last["tick"], last["round"], last["eval_accuracy"]
    said = f"{data_size(last['bits_workers'])}, {data_size(last['bits_hubs'])}"
    each = f" ({ticks / rounds:.1f} ticks a round)" if rounds else ""
    return [
        ("ended", why),
        ("ticks, rounds", f"{number(ticks)}, {number(rounds)}{each}"),
        ("train loss, test loss", f"{number(last['train_loss'])}, {number(last['eval_loss'])}"),
        ("test accuracy", "—" if accuracy is None else f"{accuracy:.4f}"),
        ("sent by a worker, by a hub", said),
        ("seconds", f"{seconds:.1f}"),
    ]


def main() -> None:
    define_flags()
    run_binary(train, __doc__ or "")


if __name__ == "__main__":
    main()
