"""Every method on leaves of all shapes and floating-point types, and in the strict modes of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry
from registry import METHODS, OPTIMIZERS

import jaxlocal
from jaxlocal import RoundFn

SHAPES = {
    "float16": ((5,), jnp.float16),
    "no values": ((0, 3), jnp.float32),
    "no values, half": ((2, 0), jnp.bfloat16),
    "one value": ((1, 1), jnp.float32),
    "scalar": ((), jnp.float32),
    "scalar, half": ((), jnp.bfloat16),
}
CASES = {method: (method, optimizer) for method, optimizer in registry.CASES}.values()


def loss(params, model_state, batch, key):
    """The loss of the registry, which depends on the other leaves too."""
    value, aux = registry.loss(params, model_state, batch, key)
    others = [params[name].astype(jnp.float32) for name in SHAPES if name in params]
    return value + 0.1 * sum(jnp.square(x).sum() for x in others), aux


def start(method, optimizer, more=False):
    """The round function of a registered method, with its parameters and some leaves besides."""
    entry = METHODS[method]
    grad_fn = jaxlocal.gradients(loss, stateful=True)
    round_fn = RoundFn(entry.build(grad_fn, OPTIMIZERS[optimizer]), entry.layout)
    params = entry.params()
    for name, (shape, dtype) in SHAPES.items() if more else ():
        params[name] = jnp.full(shape, 0.5, dtype if entry.half else jnp.float32)
    return round_fn, params, registry.batches(entry.layout, 0, entry.steps)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "optimizer"), CASES)
def test_leaves_of_all_shapes_and_types_stay_finite_and_keep_theirs(method, optimizer):
    round_fn, params, batches = start(method, optimizer, more=True)
    state = round_fn.init(params, jax.random.key(0), registry.model_state())
    state, _ = round_fn(state, batches, length=METHODS[method].steps)
    mean, distance = round_fn.mean(state)[0], round_fn.consensus_distance(state)
    assert np.isfinite(distance)
    for name, x in params.items():
        assert (mean[name].shape, mean[name].dtype) == (x.shape, x.dtype)
        assert np.isfinite(np.asarray(mean[name], np.float32)).all()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "optimizer"), CASES)
def test_a_round_keeps_to_the_strict_modes_of_jax(method, optimizer):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        round_fn, params, batches = start(method, optimizer)
        round_fn.lower(round_fn.shapes(params, registry.model_state()), batches)
