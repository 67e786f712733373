"""PowerSGD on matrices of lower rank than its own: rounding has no say in what is sent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh
from jaxlocal.compression import powersgd
from jaxlocal.compression.low_rank import _basis

WORKERS, MESSAGES = 4, 5
SHAPES = [(12, 9, 4), (40, 16, 2), (16, 40, 5)]  # rows, columns, rank


def of_rank_one(random, rows, columns):
    """Gradients whose average has rank 1, of workers that differ in their left factor."""
    return random.normal(size=(MESSAGES, WORKERS, rows, 1)) * random.normal(
        size=(MESSAGES, 1, 1, columns)
    )


def then_of_full_rank(random, rows, columns):
    gradients = of_rank_one(random, rows, columns)
    gradients[-1] = random.normal(size=(WORKERS, rows, columns))
    return gradients


def zero_between(random, rows, columns):
    gradients = then_of_full_rank(random, rows, columns)
    gradients[1:3] = 0
    return gradients


KINDS = [of_rank_one, then_of_full_rank, zero_between]


def gradients_of(kind, seed, rows, columns, dtype=np.float32):
    return jnp.asarray(kind(np.random.default_rng(seed), rows, columns), dtype)


def in_turn(x):
    return ((x[0] / 4 + x[1] / 4) + x[2] / 4) + x[3] / 4


def in_pairs(x):
    return ((x[0] + x[1]) + (x[2] + x[3])) / 4


def message(code, mean, trees, memory, key):
    """What is sent of the workers' trees, their residuals, and the memory after the message."""
    average = lambda payload: jax.tree.map(mean, payload)
    decode = lambda payload, onto, scale: code.decode(payload, None, onto, scale)
    known = code.second.settle(average(jax.vmap(lambda x: code.encode(x, memory, None))(trees)))
    own = jax.vmap(lambda x: code.second.encode(x, known, None))(trees)
    residual = jax.vmap(lambda x, own: decode({**known, **own}, x, -1.0))(trees, own)
    payload = {**known, **average(own)}
    sent = decode(payload, jnp.zeros(trees.shape[1:]), 1.0)
    return sent, residual, code.second.remember(memory, payload, key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def messages(code, mean, gradients):
    """What is sent in each message, and the residuals, where averages round as `mean` does."""
    memory, results = code.init(gradients[0, 0]), []
    for number, trees in enumerate(gradients):
        *result, memory = message(code, mean, trees, memory, jax.random.key(number))
        results.append(result)
    return results


CODES = {rank: powersgd(rank) for _, _, rank in SHAPES}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, columns, rank", SHAPES)
def test_averages_that_round_differently_give_close_messages(kind, rows, columns, rank):
    for seed in range(3):
        gradients = gradients_of(kind, seed, rows, columns)
        one, other = (messages(CODES[rank], mean, gradients) for mean in (in_turn, in_pairs))
        # Directions of rounding, sent as such, would differ by the whole of a gradient.
        bound = 1e-4 * float(jnp.abs(gradients).max())
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "rows, columns, rank, dtype",
    [*((*shape, jnp.float32) for shape in SHAPES), (40, 16, 2, jnp.bfloat16)],
)
def test_the_residual_is_what_lies_outside_the_average(rows, columns, rank, dtype):
    """In float64, where the one direction of the average is known."""
    factors = np.random.default_rng(0).integers(-3, 4, size=(WORKERS, rows)) + 0.5
    right = np.random.default_rng(1).integers(1, 4, size=columns)  # products are exact in bfloat16
    exact = factors[:, :, None] * right
    sent, residual = messages(CODES[rank], in_turn, jnp.asarray(exact, dtype)[None])[0]
    left = factors.mean(0) / np.linalg.norm(factors.mean(0))
    outside = exact - left[:, None] * (left @ exact)[:, None]
    np.testing.assert_allclose(sent, exact.mean(0), rtol=0, atol=1e-5)
    rounding = 1e-5 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(np.float64(residual), outside, rtol=0, atol=rounding)


def test_a_column_that_depends_on_others_is_zero_and_the_rest_are_orthonormal():
    a, b = np.random.default_rng(0).normal(size=(2, 30)).astype(np.float32)
    basis = np.float64(_basis(jnp.stack([a, 3 * a, b, 0 * a, a - b, 1e-30 * a], axis=1)))
    np.testing.assert_array_equal(basis[:, [1, 3, 4, 5]], 0)
    np.testing.assert_allclose(basis.T @ basis, np.diag([1, 0, 1, 0, 0, 0]), rtol=0, atol=1e-6)
    kept = basis @ (basis.T @ np.float64([a, b]).T)
    np.testing.assert_allclose(kept, np.float64([a, b]).T, rtol=0, atol=1e-5)


def test_of_full_rank_it_is_the_factor_of_householder_and_nan_stays():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(30, 4)), jnp.float32)
    for scale in (1.0, 1e-25, 1e25):
        np.testing.assert_array_equal(_basis(scale * x), jnp.linalg.qr(scale * x)[0])
    assert np.isnan(_basis(x.at[3, 1].set(np.nan))).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_two_and_four_devices_agree(kind):
    gradients = gradients_of(kind, 0, 12, 9)
    loss = lambda params, batch, key: (params["w"] * batch).sum()  # its gradient is the batch
    method = jaxlocal.data_parallel(jaxlocal.gradients(loss), optax.sgd(0.1), compressor=CODES[4])
    layout, models = Layout(workers_per_hub=WORKERS), []
    for devices in (1, 2, 4):
        round_fn = RoundFn(method, layout, make_mesh(layout, shape=(1, devices)))
        state = round_fn.init({"w": jnp.zeros((12, 9))}, jax.random.key(0))
        for batch in gradients:
            state, _ = round_fn(state, batch[None, None])
        models.append(np.asarray(state.params["w"]))
    for model in models[1:]:
        np.testing.assert_allclose(model, models[0], rtol=0, atol=1e-5)
