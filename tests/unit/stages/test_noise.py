"""Random keys in optimizer and model states: each worker draws its own noise, unless all take the
same step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh, periods
from jaxlocal.communication import mixing
from jaxlocal.parallel.keys import own_keys
from jaxlocal.stages import (
    averaged_gradients,
    error_feedback,
    in_turn,
    local_step,
    repeat,
    sequence,
    sync,
)
from jaxlocal.types import Method

SIZE, STEPS, WORKERS = 500, 2, 4
LAYOUT = Layout(1, WORKERS)
GRAD_FN = jaxlocal.gradients(lambda params, batch, key: 0.0 * (params * batch).sum())
NOISE = optax.noisy_sgd(1.0, eta=1.0, gamma=0.5, key=3)
BATCHES = np.zeros((STEPS, 1, WORKERS, 1), np.float32)


class Raw(optax.GradientTransformation):
    """Noise from an untyped key in an optimizer state, as `optax.contrib.sophia` has one."""


def _raw_noise(updates, state, params=None):
    key, own = jax.random.split(state["key"])
    return jax.tree.map(lambda u: jax.random.normal(own, u.shape), updates), {"key": key}


RAW = Raw(lambda params: {"key": jax.random.PRNGKey(3)}, _raw_noise)


@functools.cache
def moves(optimizer, devices=1, optimizer_state="keep", rounds=1, workers=WORKERS):
    """How far noise alone has moved each worker in every round, [rounds, K, SIZE]."""
    method = Method(
        local_step(GRAD_FN, optimizer),
        sync(mixing.mean(), optimizer_state=optimizer_state, optimizer=optimizer),
        optimizer,
        periods.constant(STEPS),
    )
    layout = Layout(1, workers)
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=(1, devices)))
    state, moved = round_fn.init(jnp.zeros(SIZE), jax.random.key(0)), []
    for _ in range(rounds):
        start = np.array(state.params)[0]
        state, _ = round_fn.local_steps(state, BATCHES[:, :, :workers])
        moved.append(np.array(state.params)[0] - start)
        state, _ = round_fn.end_round(state)
    return np.stack(moved)


def correlations(one, other):
    return np.corrcoef(one, other)[: len(one), len(one) :]


@pytest.mark.parametrize("optimizer", [NOISE, RAW], ids=["typed", "raw"])
def test_noise_differs_by_worker(optimizer):
    (noise,) = moves(optimizer)
    # Four standard deviations of a correlation over SIZE draws.
    assert np.abs(correlations(noise, noise) - np.eye(WORKERS)).max() < 4 / np.sqrt(SIZE)


def test_noise_does_not_depend_on_the_devices():
    np.testing.assert_array_equal(moves(NOISE), moves(NOISE, devices=2))


@pytest.mark.parametrize("optimizer_state", ["average", "reset"])
def test_a_synchronisation_leaves_every_worker_its_noise_which_goes_on(optimizer_state):
    noise = moves(NOISE, optimizer_state=optimizer_state, rounds=2)
    assert np.abs(correlations(noise[0], noise[1])).max() < 4 / np.sqrt(SIZE)
    assert np.abs(correlations(noise[1], noise[1]) - np.eye(WORKERS)).max() < 4 / np.sqrt(SIZE)


def test_the_noise_of_one_worker_alone_is_that_of_optax():
    (noise,) = moves(NOISE, workers=1)
    params, state = jnp.zeros(SIZE), NOISE.init(jnp.zeros(SIZE))
    for _ in range(STEPS):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = NOISE.update(jnp.zeros(SIZE), state, params)
        params = params + updates
    np.testing.assert_allclose(noise[0], params, rtol=1e-5, atol=1e-5)


def test_workers_that_take_the_same_step_stay_equal_to_the_bit():
    round_fn = RoundFn(jaxlocal.data_parallel(GRAD_FN, NOISE), LAYOUT)
    state = round_fn.init(jnp.zeros(SIZE), jax.random.key(0))
    for step in range(STEPS):
        state, _ = round_fn(state, BATCHES[step : step + 1])
    params = np.asarray(state.params)[0]
    assert np.abs(params).max() > 1
    np.testing.assert_array_equal(params, np.broadcast_to(params[0], params.shape))


LOCAL = local_step(GRAD_FN, NOISE)
COMMON = averaged_gradients(GRAD_FN, NOISE, mixing.mean())
IN_HUBS = averaged_gradients(GRAD_FN, NOISE, mixing.hub_mean())
AVERAGE = sync(mixing.mean())


@pytest.mark.parametrize(
    ("stage", "alike"),
    [
        (AVERAGE, None),
        (LOCAL, ()),
        (COMMON, ("hubs", "workers")),
        (IN_HUBS, ("workers",)),
        (sequence(COMMON, AVERAGE), ("hubs", "workers")),
        (sequence(COMMON, IN_HUBS), ("workers",)),
        (sequence(COMMON, LOCAL), ()),
        (repeat(COMMON, 2), ("hubs", "workers")),
        (in_turn(COMMON, COMMON), ("hubs", "workers")),
        (error_feedback(mixing.hub_mean(), "sign", after=IN_HUBS), ("workers",)),
        (sequence(), None),
    ],
)
def test_stages_know_along_which_axes_workers_take_the_same_step(stage, alike):
    assert stage.alike == alike


@pytest.mark.parametrize(
    ("alike", "different"),
    [((), 6), (("workers",), 2), (("hubs",), 3), (("hubs", "workers"), 1)],
)
def test_keys_are_folded_along_the_other_axes(alike, different):
    stacked = {
        "typed": jnp.broadcast_to(jax.random.key(0), (2, 3)),
        "several": jnp.broadcast_to(jax.random.split(jax.random.key(0), 5), (2, 3, 5)),
        "raw": jnp.broadcast_to(jax.random.PRNGKey(0), (2, 3, 2)),
        "words": jnp.zeros((2, 3, 4), jnp.uint32),
        "count": jnp.zeros((2, 3), jnp.int32),
    }
    own = own_keys(stacked, alike, raw=True)
    words = lambda x: np.asarray(x).reshape(6, -1)
    assert len(np.unique(words(jax.random.key_data(own["typed"])), axis=0)) == different
    assert len(np.unique(words(jax.random.key_data(own["several"])), axis=0)) == different
    assert len(np.unique(words(own["raw"]), axis=0)) == different
    assert not own["words"].any() and not own["count"].any()
    np.testing.assert_array_equal(own_keys(stacked)["raw"], stacked["raw"])


def test_keys_of_a_model_state_differ_by_worker_where_parameters_are_common_too():
    def loss(params, model_state, batch, key):
        own, drawn = jax.random.split(model_state["key"])
        return (params * batch).sum(), ({"key": own}, {"drawn": jax.random.uniform(drawn)})

    method = jaxlocal.data_parallel(jaxlocal.gradients(loss, stateful=True), optax.sgd(0.1))
    round_fn = RoundFn(method, LAYOUT)
    state = round_fn.init(jnp.zeros(1), jax.random.key(0), {"key": jax.random.key(1)})
    _, info = round_fn(state, BATCHES[:1])
    assert len(np.unique(np.asarray(info.worker["drawn"]))) == WORKERS
