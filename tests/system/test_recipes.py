"""Recipes of training by flags: step decay, epochs, clipping, H in the warm-up, soft targets."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.building.config import Config
from experiments.building.job import build_plan
from experiments.building.models import make_gradients
from experiments.building.optimizers import make_optimizer
from experiments.building.schedules import make_schedule
from jaxlocal import ConfigurationError, periods
from jaxlocal.data import Dataset

SMALL = Config(dataset="least_squares", model="linear", workers=4, batch_size=16)
EPOCH = 4096 // (4 * 16)


def refused(sentence):
    return pytest.raises(ConfigurationError, match=re.escape(sentence))


def planned(**changes):
    return build_plan(dataclasses.replace(SMALL, **changes))


def by_loop(step, peak, warmup, decays, factor):
    """The learning rate of a step, by hand."""
    if step < warmup:
        return 1e-6 + (peak - 1e-6) * step / warmup
    for at in decays:
        peak = peak * factor if step >= at else peak
    return peak


@pytest.mark.parametrize("warmup", [0, 5])
def test_step_decay_at_given_steps(warmup):
    config = Config(
        schedule="step",
        learning_rate=0.5,
        warmup_steps=warmup,
        decay_steps="6,12,16",
        decay_factor=0.2,
    )
    rate_at = periods.rates(make_schedule(config, 20))
    expected = [by_loop(step, 0.5, warmup, (6, 12, 16), 0.2) for step in range(20)]
    np.testing.assert_allclose([rate_at(step) for step in range(20)], expected, rtol=1e-9)
    assert rate_at(5) == 0.5 and rate_at(6) == 0.1


def test_a_period_reads_the_decay_that_the_optimizer_follows():
    decay = {"schedule": "step", "decay_steps": "20", "decay_factor": 0.25}
    plan = planned(steps=40, local_steps=2, period_coefficient=0.036, **decay)
    assert plan.lengths == (2,) * 10 + (8, 8, 4)  # ⌊(α/η)²⌋ is 0 and then ⌊8.29⌋


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"decay_steps": "6"}, "not in --schedule=cosine"),
        ({"schedule": "step", "decay_steps": "6,5"}, "must be ascending numbers > 0"),
        ({"schedule": "step", "decay_steps": "6;9"}, "must be ascending numbers > 0"),
        ({"schedule": "step", "decay_steps": "nan"}, "must be ascending numbers > 0"),
        ({"schedule": "step", "decay_steps": "6,20"}, "within the run of 20 steps, got 6,20"),
        ({"schedule": "step", "decay_steps": "6.5"}, "at whole steps within the run of 20 steps"),
        ({"decay_factor": 1.0}, "--decay_factor must be in (0, 1), got 1.0"),
        ({"clip_norm": 0.0}, "--clip_norm must be a number > 0, got 0.0"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 is for classification"),
        ({"mixup": 0.2}, "mixup=0.2 is for classification"),
        ({"mixup": 0.2, "accumulation": 16}, "--batch_size=16 with --accumulation=16 has one"),
        ({"epochs": 2.0}, "give --epochs or --steps, not both: 2.0 and 20"),
        ({"steps": None, "epochs": 2.0, "rounds": 3}, "give --epochs or --rounds, not both"),
        ({"steps": None, "epochs": 0.0}, "--epochs must be a number > 0, got 0.0"),
        ({"warmup_epochs": 1.0, "warmup_steps": 3}, "--warmup_epochs or --warmup_steps, not both"),
        ({"warmup_epochs": -1.0}, "--warmup_epochs must be a number ≥ 0, got -1.0"),
        ({"warmup_epochs": 1.0, "parameters": 100}, "--parameters plans without one"),
        ({"warmup_epochs": 1.0, "batch_size": 4096, "partition": "fresh"}, "no epochs to count"),
        ({"warmup_local_steps": 4}, "needs the length of the warm-up, got 0 steps"),
        ({"warmup_local_steps": 4, "period": "constant"}, "linear, quadratic, cubic, not for"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(changes, sentence):
    with refused(sentence):
        planned(**{"steps": 20, **changes})


def test_mixup_of_tokens_is_refused():
    example = {"inputs": np.zeros(8, np.int32), "targets": np.zeros(8, np.int32)}
    tokens = Dataset("text", lambda: [example], lambda: [example], 1, 1, (8,), 128)
    config = Config(dataset="text", mixup=0.2)
    with refused("--mixup=0.2 mixes inputs that are numbers, and those of text are tokens"):
        make_gradients(config, tokens, None, None)


def test_epochs_are_counted_in_steps_of_the_dataset():
    decay = {"schedule": "step", "decay_factor": 0.2}
    plan = planned(epochs=2.5, warmup_epochs=0.5, decay_epochs="1,2", **decay)
    same = planned(steps=160, warmup_steps=32, decay_steps="64,128", **decay)
    assert plan.steps == same.steps == 2.5 * EPOCH and plan.lengths == same.lengths
    assert plan.in_steps == same.config and plan.config.epochs == 2.5
    rates = lambda plan: [plan.learning_rate(step) for step in range(0, 160, 7)]
    assert rates(plan) == rates(same)


def test_on_hubs_epochs_are_rounded_down_to_whole_hub_averages():
    assert planned(method="mll_sgd", hubs=2, local_steps=5, epochs=1.0).steps == EPOCH - 4


def test_h_in_the_warm_up():
    plan = planned(steps=40, warmup_steps=10, warmup_local_steps=8, local_steps=2)
    assert plan.lengths[:3] == (8, 8, 2)


def test_clipping_scales_the_gradient_before_the_weight_decay_and_the_momentum():
    config = Config(clip_norm=1.5, weight_decay=0.1, momentum=0.9, learning_rate=0.5)
    optimizer = make_optimizer(config, lambda step: 0.5)
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
    state, expected, trace = optimizer.init(params), jax.tree.map(np.float64, params), None
    for step, scale in enumerate((1.0, 0.1)):  # of norm 5 and 0.5
        grads = {"a": np.array([3.0, 0.0]) * scale, "b": np.array(4.0) * scale}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        moved = {n: g * min(1, 1.5 / norm) + 0.1 * expected[n] for n, g in grads.items()}
        trace = moved if trace is None else {n: 0.9 * trace[n] + g for n, g in moved.items()}
        expected = {n: x - 0.5 * trace[n] for n, x in expected.items()}
        updates, state = optimizer.update(
            jax.tree.map(jnp.float32, grads), state, params, step=step
        )
        params = jax.tree.map(jnp.add, params, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), params, expected)
