"""Measurements of a run: the metrics line of a step, and the model that the metrics describe."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.building.job import Job
from experiments.building.time_slots import make_time_slots
from experiments.running.feeding import read_all
from jaxlocal import RoundFn
from jaxlocal.training.ahead import Ahead
from jaxlocal.training.evaluation import Evaluation, Reestimation
from jaxlocal.training.loop import Progress
from jaxlocal.training.running_averages import running_average
from jaxlocal.types import TrainState, Tree

# Examples on which batch statistics are estimated.
REESTIMATION_EXAMPLES = 4096


class Measure:
    """Evaluate the average model and its running averages, `measure(progress)`: the metrics line of
    a step.

    Args:
      first_batches: `first_batches(steps)`, on which `--model_state=reestimate` estimates batch
        statistics.
    """

    def __init__(
        self,
        job: Job,
        round_fn: RoundFn,
        first_batches: Callable[[int], Tree],
    ):
        config, data = job.config, job.dataset
        train = _sample(config.train_eval_examples, data.train_examples, config.seed)
        test = _sample(config.test_eval_examples, data.test_examples, config.seed)
        self._job, self._start = job, time.perf_counter()
        self._train, self._test = _evaluations(job, round_fn, train, test)
        self._time_slots = make_time_slots(job)
        self._reestimate = None
        averaged = job.running_averages and jax.tree.leaves(job.model_shapes[1])
        if config.model_state == "reestimate" or averaged:
            self._reestimate = _reestimation(job, round_fn, first_batches)

    def start(self, seconds: float = 0.0) -> None:
        """Start the clock of the run, which took some seconds before it was resumed."""
        self._start = time.perf_counter() - seconds

    def compile_ahead(self, state: TrainState, ahead: Ahead) -> None:
        """Compile the evaluations in threads; the state may be its shapes."""
        for evaluation in (self._test, self._train):
            evaluation.compile_ahead(state, ahead)

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, including those before it was resumed."""
        return time.perf_counter() - self._start

    def model(self, state: TrainState, average: str | None = None) -> TrainState:
        """The state whose average is the model that is evaluated and exported.

        Args:
          average: the name of a running average, which has no batch statistics but estimated ones;
            by default the model that trains.
        """
        if average:
            state = running_average(state, average)
        elif self._job.config.model_state != "reestimate":
            return state
        return self._reestimate(state) if self._reestimate else state

    def __call__(self, progress: Progress) -> dict[str, Any]:
        state = self.model(progress.state)
        test = self._test(state)
        return {
            "step": progress.step,
            "round": progress.round,
            "time_slots": self._time_slots(progress.step),
            "wall_seconds": round(self.seconds, 3),
            "train_loss": self._train(state)["loss"],
            "eval_loss": test["loss"],
            "eval_accuracy": test.get("accuracy"),
            "learning_rate": self._job.learning_rate(max(0, progress.step - 1)),
            "local_steps": progress.round_length,
            "consensus_distance": progress.distance,
            "bits_workers": progress.message_bits.workers,
            "bits_hubs": progress.message_bits.hubs,
            **self._of_running_averages(progress.state),
        }

    def _of_running_averages(self, state: TrainState) -> dict[str, Any]:
        """Test metrics of the running averages, as of the end of the last round."""
        values: dict[str, Any] = {}
        for name in self._job.running_averages:
            test = self._test(self.model(state, name))
            values[f"eval_loss_{name}"] = test["loss"]
            values[f"eval_accuracy_{name}"] = test.get("accuracy")
        return values


def _evaluations(
    job: Job, round_fn: RoundFn, train: np.ndarray, test: np.ndarray
) -> tuple[Evaluation, Evaluation]:
    """Evaluations on the numbered examples of the training and of the test set."""
    metrics, data = job.metrics, job.dataset
    if not job.config.stream:
        resident = read_all(data.test_source, data.name, data.classes)
        return (
            Evaluation(round_fn, metrics, examples=train),
            Evaluation(round_fn, metrics, resident, test),
        )
    return (
        Evaluation(round_fn, metrics, examples=train, source=data.train_source()),
        Evaluation(round_fn, metrics, examples=test, source=data.test_source()),
    )


def _sample(wanted: int, have: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(have)[: wanted or have])


def _reestimation(
    job: Job, round_fn: RoundFn, first_batches: Callable[[int], Tree]
) -> Reestimation:
    """Estimate batch statistics on the first batches of the run."""
    model, normalize = job.model, job.dataset.normalize

    def apply(params: Tree, model_state: Tree, batch: Tree) -> Tree:
        key = jax.random.key(0)  # for dropout, which is on in training too
        return model.apply(params, model_state, normalize(batch["inputs"]), key, True)[1]

    steps = -(-REESTIMATION_EXAMPLES // (job.layout.workers * job.config.batch_size))
    return Reestimation(round_fn, apply, first_batches(steps))
