"""Separable data over workers: the perceptron loss and the three partitions of the paper."""

import dataclasses

import numpy as np
import pytest
from short_runs import run

from experiments.building.config import Config
from experiments.building.job import build_job
from experiments.running.feeding import Feed
from jaxlocal import ConfigurationError

CONFIG = Config(
    dataset="perceptron:squared_hinge", model="logistic", workers=4, batch_size=8, local_steps=4,
    steps=16, schedule="constant", learning_rate=0.02, momentum=0.0, eval_every=8,
    checkpoint_every=0, period="constant",
)  # fmt: skip


def losses_of(config, folder):
    status, lines = run(config, folder)
    assert status == 0
    return [line["train_loss"] for line in lines]


def reference(config, rounds=4):
    """Local SGD with the squared hinge of single examples, in float64; the training loss."""
    job = build_job(config)
    train = job.dataset.train()
    x, y = train["inputs"].astype(float), 2.0 * train["targets"] - 1
    with Feed(job) as feed:
        indices = feed.batches.indices(0, 4 * rounds)[:, 0]
    weights, bias = np.zeros(32), 0.0
    for start in range(0, 4 * rounds, 4):
        ends = []
        for worker in range(config.workers):
            w, b = weights.copy(), bias
            for batch in indices[start : start + 4, worker]:
                slack = np.maximum(0, 1 - y[batch] * (x[batch] @ w + b))
                slope = -2 * slack * y[batch] / len(batch)
                w, b = (
                    w - config.learning_rate * slope @ x[batch],
                    b - config.learning_rate * slope.sum(),
                )
            ends.append((w, b))
        weights, bias = np.mean([w for w, _ in ends], 0), np.mean([b for _, b in ends])
    return np.mean(np.maximum(0, 1 - y * (x @ weights + bias)) ** 2)


@pytest.mark.slow  # four programs
def test_runs_have_the_losses_of_the_definition(tmp_path):
    for partition in ("iid", "sorted", "by_distance"):
        config = dataclasses.replace(CONFIG, partition=partition)
        losses = losses_of(config, tmp_path / partition)
        assert losses[0] == 1.0  # zero weights: every slack is 1
        np.testing.assert_allclose(losses[-1], reference(config), rtol=1e-4)
    perceptron = dataclasses.replace(CONFIG, dataset="perceptron")
    losses = losses_of(perceptron, tmp_path / "perceptron")
    assert losses[0] == 0.0 and losses[1] > 0  # zero weights have no loss, and still move


def test_soft_targets_are_for_a_cross_entropy():
    config = dataclasses.replace(CONFIG, label_smoothing=0.1)
    with pytest.raises(
        ConfigurationError, match="cross-entropy, .* perceptron:squared_hinge is squ"
    ):
        build_job(config)
