"""What is measured of a run: the metrics line of a step, and the model that its metrics are of."""

import time
from typing import Any

import jax
import numpy as np

from experiments.building.job import Job
from experiments.running.feeding import read_all
from jaxlocal import ConfigurationError, RoundFn
from jaxlocal.models import Model
from jaxlocal.models.supervised import evaluation_metrics
from jaxlocal.training.evaluation import Evaluation, Reestimation
from jaxlocal.training.loop import Progress
from jaxlocal.types import TrainState, Tree

# Examples on which batch statistics are estimated anew.
REESTIMATION_EXAMPLES = 4096


class Measure:
    """Turns a step that is due into a metrics line.

    Args:
      seconds: that the run has taken before it was resumed.
      first_batches: `first_batches(steps)`, for batch statistics that are estimated anew.
    """

    def __init__(self, job: Job, round_fn: RoundFn, first_batches: Any, seconds: float = 0.0):
        assert job.dataset is not None and job.model is not None
        config, data = job.config, job.dataset
        metrics = evaluation_metrics(job.model, data.normalize, data.classes)
        train = _sample(config.train_eval_examples, data.train_examples, config.seed)
        test = _sample(config.test_eval_examples, data.test_examples, config.seed)
        self._job, self._start = job, time.perf_counter() - seconds
        if config.stream:
            self._train = Evaluation(round_fn, metrics, examples=train, source=data.train_source())
            self._test = Evaluation(round_fn, metrics, examples=test, source=data.test_source())
        else:
            self._train = Evaluation(round_fn, metrics, examples=train)
            self._test = Evaluation(round_fn, metrics, read_all(data.test_source), test)
        self._reestimate = None
        if config.model_state == "reestimate":
            self._reestimate = _reestimation(job, job.model, round_fn, first_batches)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def model(self, state: TrainState) -> TrainState:
        """The state whose average is the model that is evaluated and exported."""
        return self._reestimate(state) if self._reestimate else state

    def __call__(self, progress: Progress) -> dict[str, Any]:
        state = self.model(progress.state)
        test = self._test(state)
        return {
            "step": progress.step,
            "round": progress.round,
            "wall_seconds": round(self.seconds, 3),
            "train_loss": self._train(state)["loss"],
            "eval_loss": test["loss"],
            "eval_accuracy": test.get("accuracy"),
            "learning_rate": self._job.learning_rate(max(0, progress.step - 1)),
            "local_steps": progress.local_steps,
            "consensus_distance": progress.distance,
            "bits_workers": progress.message_bits.workers,
            "bits_hubs": progress.message_bits.hubs,
        }


def check_model(job: Job) -> None:
    """Whether the model gives what the examples ask for, before anything is compiled or written.

    Raises:
      ConfigurationError: it does not.
    """
    assert job.dataset is not None and job.model is not None
    data = job.dataset
    batch = jax.tree.map(lambda x: np.asarray(x)[None], data.train_source()[0])
    model = jax.eval_shape(job.model.init, jax.random.key(0))
    metrics = evaluation_metrics(job.model, data.normalize, data.classes)
    try:
        jax.eval_shape(metrics, *model, batch)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{job.config.model} does not fit {job.config.dataset}: {error}"
        ) from None


def _sample(wanted: int, have: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(have)[: wanted or have])


def _reestimation(job: Job, model: Model, round_fn: RoundFn, first_batches: Any) -> Reestimation:
    """Over the first batches of the run, as the workers were given them."""
    assert job.dataset is not None
    normalize = job.dataset.normalize

    def apply(params: Tree, model_state: Tree, batch: Tree) -> Tree:
        key = jax.random.key(0)  # of dropout, which batch statistics see in training too
        return model.apply(params, model_state, normalize(batch["inputs"]), key, True)[1]

    steps = -(-REESTIMATION_EXAMPLES // (job.layout.workers * job.config.batch_size))
    return Reestimation(round_fn, apply, first_batches(steps))
