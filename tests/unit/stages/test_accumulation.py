"""Gradient accumulation: a batch in parts gives the gradient of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh

LAYOUT = Layout(2, 2, rates=[1, 0.5, 1, 0.5])


@pytest.mark.parametrize("worker_map", ["vmap", "map"])
@pytest.mark.parametrize("method", [jaxlocal.local_sgd, jaxlocal.data_parallel])
def test_parts_give_the_run_of_the_whole_batch(method, worker_map):
    batches, ends = problems.make_batches(LAYOUT, 6, examples=12), []
    with jax.enable_x64(True):
        for parts in (1, 2, 3, 12):
            grad_fn = jaxlocal.accumulate(problems.grad_fn, parts)
            local = method(grad_fn, optax.adam(0.1), worker_map=worker_map)
            round_fn = RoundFn(local, LAYOUT, make_mesh(LAYOUT, shape=(2, 2)), max_chunk=1)
            state = round_fn.init(problems.START, jax.random.key(0))
            state, info = round_fn(state, batches, length=6)
            ends.append((problems.vectors(state.params), np.asarray(info.worker["loss"])))
    for end in ends[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), end, ends[0])


def test_every_part_is_given_the_model_state_of_the_part_before_it_and_its_own_key():
    def loss(w, state, batch, key):
        seen = {
            "last": batch.mean(),
            "parts": state["parts"] + 1,
            "sum": state["sum"] + batch.sum(),
        }
        return w * batch.mean(), (
            seen,
            {"drawn": jax.random.uniform(key), "count": len(batch), "odd": batch[0] % 4 == 0},
        )

    grad_fn = jaxlocal.accumulate(jaxlocal.gradients(loss, stateful=True), 4)
    start = {"last": jnp.float32(0), "parts": jnp.int32(0), "sum": jnp.float32(0)}
    batch, key = jnp.arange(8.0), jax.random.key(3)
    grads, state, metrics = jax.jit(grad_fn)(jnp.float32(2), start, batch, key)
    assert (float(grads), float(metrics["loss"]), float(metrics["count"])) == (3.5, 7.0, 2)
    assert float(metrics["odd"]) == 0.5  # of the parts
    assert (float(state["last"]), int(state["parts"]), float(state["sum"])) == (6.5, 4, 28)
    drawn = [float(jax.random.uniform(jax.random.fold_in(key, n))) for n in range(4)]
    assert len(set(drawn)) == 4
    np.testing.assert_allclose(float(metrics["drawn"]), np.mean(drawn), rtol=1e-6)


def test_half_precision_gradients_are_summed_in_float32():
    """64 ones and a 2⁻⁸: a bfloat16 sum would round the small ones away."""
    grad_fn = jaxlocal.gradients(lambda w, batch, key: (w * batch.astype(w.dtype)).mean())
    batch = jnp.where(jnp.arange(128) % 2, 1.0, 2.0**-8)
    whole = (1 + 2.0**-8) / 2
    grads, _, _ = jaxlocal.accumulate(grad_fn, 128)(jnp.bfloat16(1), {}, batch, jax.random.key(0))
    assert grads.dtype == jnp.bfloat16 and grads == jnp.bfloat16(whole)


def test_a_batch_that_does_not_divide_is_one_sentence():
    grad_fn = jaxlocal.accumulate(problems.grad_fn, 3)
    round_fn = problems.on_one_device(jaxlocal.local_sgd(grad_fn, optax.sgd(0.1)), Layout(1, 2))
    state = round_fn.init(problems.START, jax.random.key(0))
    with pytest.raises(ConfigurationError, match="batch of 4 does not divide into 3"):
        round_fn(state, problems.make_batches(Layout(1, 2), 1))
    with pytest.raises(ConfigurationError, match="at least 1, got 0"):
        jaxlocal.accumulate(problems.grad_fn, 0)
