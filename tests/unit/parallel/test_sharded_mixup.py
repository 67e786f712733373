"""Mixup gives the same numbers however the workers, and the examples of each, lie on devices.

On a model axis the examples of a batch are sharded, and the first on a device is mixed with the
last on another.
"""

import functools

import jax
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh
from jaxlocal.models import Model, training_loss

STEPS, BATCH, FEATURES, CLASSES = 2, 8, 16, 3
LAYOUT = Layout(workers_per_hub=4)
PARAMS = {"matrix": np.float32(np.random.default_rng(0).normal(size=(FEATURES, CLASSES)) / 4)}
RULE = jaxlocal.sharding.by_name([("matrix", jax.P("model"))])


def logits(params, model_state, inputs, key, train):
    return inputs @ params["matrix"], model_state


@functools.cache
def trained(shape):
    """Losses [steps, 1, 4] and parameters after a round on a mesh."""
    model = Model(lambda key: (PARAMS, {}), logits)
    loss = training_loss(model, lambda inputs: inputs, CLASSES, mixup=0.4, label_smoothing=0.1)
    grad_fn = jaxlocal.gradients(loss, stateful=True)
    method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.5), period=STEPS)
    round_fn = RoundFn(method, LAYOUT, make_mesh(LAYOUT, shape=shape), sharding=RULE)
    random, grid = np.random.default_rng(1), (STEPS, *LAYOUT.shape, BATCH)
    batches = {
        "inputs": np.float32(random.normal(size=(*grid, FEATURES))),
        "targets": np.int32(random.integers(CLASSES, size=grid)),
    }
    state = round_fn.init(PARAMS, jax.random.key(0))
    state, info = round_fn(state, batches)
    return np.asarray(info.worker["loss"]), np.asarray(state.params["matrix"])


SLOW = [pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 2, 1), (1, 1, 2))]


@pytest.mark.parametrize("shape", [*SLOW, (1, 2, 4)], ids=str)
def test_mixup_does_not_depend_on_the_number_of_devices(shape):
    for found, expected in zip(trained(shape), trained((1, 1, 1)), strict=True):
        np.testing.assert_allclose(
            found, expected, rtol=1e-5, atol=1e-6
        )  # float32 in another order
