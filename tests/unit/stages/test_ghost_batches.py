"""Accumulation with batch normalisation is ghost batches: a loop in float64, gradients by
differences."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxlocal
from jaxlocal.models import from_nnx

PARTS, SIZE, FEATURES, MOMENTUM, EPSILON = 3, 4, 2, 0.9, 1e-5
RANDOM = np.random.default_rng(0)
INPUTS = RANDOM.normal(size=(PARTS * SIZE, FEATURES)).astype(np.float32)
TARGETS = RANDOM.normal(size=PARTS * SIZE).astype(np.float32)
WEIGHT = RANDOM.normal(size=(FEATURES, 1))


class Normalized(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(FEATURES, 1, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(1, momentum=MOMENTUM, epsilon=EPSILON, rngs=rngs)

    def __call__(self, inputs):
        return self.norm(self.linear(inputs))[:, 0]


def loop(weight, scale, bias, parts):
    """The loss over ghost batches, and the running mean and variance after them."""
    inputs, targets = INPUTS.astype(np.float64), TARGETS.astype(np.float64)
    loss, mean, variance = 0.0, 0.0, 1.0
    for part in np.split(np.arange(len(inputs)), parts):
        hidden = inputs[part] @ weight[:, 0]
        of_part = hidden.mean(), hidden.var()
        outputs = scale * (hidden - of_part[0]) / np.sqrt(of_part[1] + EPSILON) + bias
        loss += (0.5 * (outputs - targets[part]) ** 2).mean() / parts
        mean = MOMENTUM * mean + (1 - MOMENTUM) * of_part[0]
        variance = MOMENTUM * variance + (1 - MOMENTUM) * of_part[1]
    return loss, mean, variance


def test_accumulation_normalises_each_part_by_its_own_statistics():
    model = from_nnx(Normalized)
    params, model_state = model.init(jax.random.key(0))
    params["linear"]["kernel"] = jnp.asarray(WEIGHT, jnp.float32)
    params["norm"] = {"scale": jnp.array([1.5]), "bias": jnp.array([0.25])}

    def loss(params, model_state, batch, key):
        outputs, model_state = model.apply(params, model_state, batch["x"], key, True)
        return (0.5 * (outputs - batch["y"]) ** 2).mean(), (model_state, {})

    grad_fn = jaxlocal.accumulate(jaxlocal.gradients(loss, stateful=True), PARTS)
    batch = {"x": jnp.asarray(INPUTS), "y": jnp.asarray(TARGETS)}
    grads, after, metrics = grad_fn(params, model_state, batch, jax.random.key(1))

    expected, mean, variance = loop(WEIGHT, 1.5, 0.25, PARTS)
    close = {"rtol": 1e-4, "atol": 1e-5}  # float32 against float64
    np.testing.assert_allclose(metrics["loss"], expected, **close)
    np.testing.assert_allclose(after["norm"]["mean"], [mean], **close)
    np.testing.assert_allclose(after["norm"]["var"], [variance], **close)
    for row in range(FEATURES):
        step = 1e-6 * np.eye(FEATURES)[:, row : row + 1]
        up, down = (loop(WEIGHT + sign * step, 1.5, 0.25, PARTS)[0] for sign in (1, -1))
        difference = (up - down) / 2e-6
        np.testing.assert_allclose(grads["linear"]["kernel"][row, 0], difference, **close)
    assert abs(expected - loop(WEIGHT, 1.5, 0.25, 1)[0]) > 0.01  # of the whole batch
