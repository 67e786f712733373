"""How often a model is traced: large ones take seconds for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxlocal
from jaxlocal import Layout, RoundFn
from jaxlocal.models import from_nnx
from jaxlocal.models.layers import BatchNorm
from jaxlocal.training.evaluation import Reestimation

LAYOUT = Layout(workers_per_hub=2)


def counted():
    """A loss, and a list that grows whenever it is traced."""
    traces = []

    def loss(w, batch, key):
        traces.append(batch.shape)
        return jnp.mean((w - batch) ** 2)

    return loss, traces


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_chunks_of_all_lengths_take_one_trace_of_the_loss(micro_batches):
    loss, traces = counted()
    grad_fn = jaxlocal.accumulate(jaxlocal.gradients(loss), micro_batches)
    round_fn = RoundFn(jaxlocal.local_sgd(grad_fn, optax.sgd(0.1), period=5), LAYOUT)
    assert list(round_fn.chunks(5)) == [5] and list(round_fn.chunks(21)) == [16, 4, 1]
    state = round_fn.init(np.float32(0), jax.random.key(0))
    for steps in (5, 21):
        state, _ = round_fn(state, np.ones((steps, 1, 2, 4), np.float32), length=steps)
    assert traces == [(4 // micro_batches,)]


def test_reestimation_takes_one_trace_of_the_model():
    loss, _ = counted()
    round_fn = RoundFn(jaxlocal.local_sgd(jaxlocal.gradients(loss), optax.sgd(0.1)), LAYOUT)
    state = round_fn.init(np.float32(0), jax.random.key(0), {"mean": np.float32(0)})
    traces = []

    def apply(params, model_state, batch):
        traces.append(batch.shape)
        return {"mean": 0.9 * model_state["mean"] + 0.1 * batch.mean()}

    Reestimation(round_fn, apply, np.ones((3, 1, 2, 4), np.float32))(state)
    assert traces == [(4,)]


def test_no_trace_of_batch_norm_or_of_random_streams_looks_for_a_sharding(monkeypatch):
    """A traced array answers by an error, whose message JAX makes from the whole trace so far."""
    found = []

    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(3, 4, rngs=rngs), BatchNorm(4, rngs=rngs)

        def __call__(self, inputs):
            return self.norm(self.first(inputs))

    def sharding(tracer):
        found.append(tracer)
        raise AttributeError

    model = from_nnx(Normed)
    monkeypatch.setattr(jax.core.Tracer, "sharding", property(sharding))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    apply = lambda params, model_state, inputs: model.apply(params, model_state, inputs, None, True)
    _, after = jax.eval_shape(apply, *shapes, jnp.ones((2, 3)))
    assert after == shapes[1]
    assert not found
