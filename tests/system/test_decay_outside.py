"""The optimizers of `--decay_outside_compressor`."""

import numpy as np
import optax
import pytest

from experiments.building.config import Config
from experiments.building.optimizers import make_decay_optimizer, make_optimizer


def rate(step):
    return 0.1 / (1 + step)


def updates(optimizer, gradients, params):
    """The updates of some steps at fixed parameters, [steps, dim]."""
    state, made = optimizer.init(params), []
    optimizer = optax.with_extra_args_support(optimizer)
    for step, gradient in enumerate(gradients):
        update, state = optimizer.update(gradient, state, params, step=step)
        made.append(update)
    return np.stack(made)


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw", "lion"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_updates_are_a_part_of_the_gradient_and_a_part_of_the_decay(name, momentum):
    config = Config(method="ef_sgd", optimizer=name, momentum=momentum, weight_decay=0.3)
    outside = Config(**{**vars(config), "decay_outside_compressor": True})
    random = np.random.default_rng(0)
    gradients, params = random.normal(size=(4, 3)), random.normal(size=3)
    both = updates(make_optimizer(config, rate), gradients, params)
    first = updates(make_optimizer(outside, rate), gradients, params)
    decay = updates(make_decay_optimizer(outside, rate), np.zeros_like(gradients), params)
    np.testing.assert_allclose(first + decay, both, rtol=1e-5, atol=1e-7)  # in float32
    assert np.abs(decay).min() > 1e-4 and make_decay_optimizer(config, rate) is None
