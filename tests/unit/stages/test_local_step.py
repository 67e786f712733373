"""The local step: which workers take it, on which examples, with which keys, and its reports."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh, periods
from jaxlocal.communication import mixing
from jaxlocal.communication.accounting import message_bits, model_bits
from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.pool import fetch
from jaxlocal.stages.averaged_gradients import averaged_gradients
from jaxlocal.stages.compose import NOTHING
from jaxlocal.stages.gradient import gradients
from jaxlocal.stages.local_step import local_step
from jaxlocal.stages.optimizers import scale_by_step
from jaxlocal.types import MessageBits, Method

MODES = pytest.mark.parametrize("mode", ["vmap", "map"])
HALF = Layout(2, 4, rates=0.5)


def constant_gradient(params, batch, key):
    """A loss whose gradient is the batch."""
    return params @ batch


def steps_only(grad_fn, optimizer, layout, mesh=(1, 1), data=(), **options):
    method = Method(
        local_step(grad_fn, optimizer, **options), NOTHING, optimizer, periods.constant(1)
    )
    return RoundFn(method, layout, make_mesh(layout, shape=mesh), data)


def ones(layout, steps):
    return np.ones((steps, *layout.shape, 2), np.float32)


def test_gradients_of_a_loss():
    grad_fn = gradients(lambda params, batch, key: (params * batch) ** 2)
    grads, model_state, metrics = grad_fn(3.0, {"kept": 1}, 2.0, None)
    assert (grads, metrics) == (24.0, {"loss": 36.0}) and model_state == {"kept": 1}


def test_gradients_of_a_stateful_loss():
    def loss(params, model_state, batch, key):
        return params * batch, ({"seen": model_state["seen"] + 1}, {"double": 2 * params})

    grads, model_state, metrics = gradients(loss, stateful=True)(3.0, {"seen": 4}, 5.0, None)
    assert grads == 5.0 and model_state == {"seen": 5} and metrics == {"loss": 15.0, "double": 6.0}


def test_the_loss_of_a_step_is_that_of_the_model_before_it():
    round_fn = steps_only(problems.grad_fn, optax.sgd(0.1), Layout(1, 2))
    batches = problems.make_batches(Layout(1, 2), 1)
    _, info = round_fn(round_fn.init(problems.START, jax.random.key(0)), batches)
    start = jax.tree.map(jnp.asarray, problems.START)
    one = lambda n: problems.loss(start, jax.tree.map(lambda b: b[0, 0, n], batches), None)
    np.testing.assert_allclose(info.worker["loss"][0, 0], [one(0), one(1)], rtol=1e-6)


@MODES
def test_a_worker_that_skips_its_step_stays_as_it_is_and_reports_zeros(mode):
    def loss(params, model_state, batch, key):
        return params @ batch, ({"steps": model_state["steps"] + 1}, {"seven": 7})

    grad_fn, layout = gradients(loss, stateful=True), HALF
    round_fn = steps_only(grad_fn, optax.adam(0.1), layout, worker_map=mode)
    state = round_fn.init(jnp.ones(2), jax.random.key(0), {"steps": jnp.int32(0)})
    count, skipped = np.zeros(layout.shape, int), 0
    for _ in range(6):
        before = np.asarray(state.params).copy()
        state, info = round_fn(state, ones(layout, 1))
        active = np.asarray(info.worker["active"])[0]
        count, skipped = count + (active == 1), skipped + (active == 0).sum()
        moved = (np.asarray(state.params) != before).all(axis=-1)
        np.testing.assert_array_equal(moved, active == 1)
        np.testing.assert_array_equal(info.worker["seven"][0], np.where(active, 7, 0))
        np.testing.assert_array_equal(info.worker["loss"][0] != 0, active == 1)
        np.testing.assert_array_equal(state.model_state["steps"], count)
        np.testing.assert_array_equal(state.opt_state[0].count, count)
    assert 6 < skipped < 42  # of 48, in the mean 24


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_workers_are_active_at_their_rates_and_independently(mesh):
    rates = np.array([0.05, 0.3, 0.5, 0.5, 0.5, 0.7, 0.95, 1.0])
    layout, steps = Layout(2, 4, rates=rates), 4096
    round_fn = steps_only(gradients(constant_gradient), optax.sgd(0.0), layout, mesh)
    state = round_fn.init(jnp.ones(2), jax.random.key(0))
    _, info = round_fn(state, ones(layout, steps))
    active = np.asarray(info.worker["active"]).reshape(steps, 8)
    # Four standard deviations of a mean of 4096 draws; rate 1 has none.
    off = np.abs(active.mean(axis=0) - rates)
    assert (off <= 4 * np.sqrt(rates * (1 - rates) / steps)).all()
    drawn = active[:, :7]
    correlations = np.corrcoef(np.concatenate([drawn[1:], drawn[:-1]], axis=1), rowvar=False)
    # Between workers, and with themselves and each other a step before.
    assert np.abs(correlations - np.eye(14)).max() < 4.5 / np.sqrt(steps)


def test_the_rate_of_learning_follows_the_runs_step_where_workers_skip():
    """x = − Σ η_t over the steps t of the run at which the worker was active."""
    schedule = lambda step: 0.5 ** jnp.asarray(step, jnp.float32)
    by_step = optax.chain(optax.identity(), scale_by_step(schedule))
    round_fn = steps_only(gradients(constant_gradient), by_step, HALF)
    state = round_fn.init(jnp.zeros(2), jax.random.key(1))
    active = []
    for steps in (4, 1, 4):  # the step of the run is counted over dispatches
        state, info = round_fn(state, ones(HALF, steps))
        active.append(np.asarray(info.worker["active"]))
    active = np.concatenate(active)
    assert active.sum(axis=0).min() > 0 and active.sum(axis=0).max() < 9
    expected = -np.einsum("t,tdn->dn", 0.5 ** np.arange(9), active)
    # Sums of distinct powers of two are exact in float32.
    np.testing.assert_array_equal(state.params, np.stack([expected] * 2, axis=-1))
    assert int(state.step) == 9


def test_a_step_by_step_takes_schedules_and_numbers_and_keeps_types():
    updates = {"half": jnp.ones(3, jnp.bfloat16), "full": jnp.ones(())}
    for transform in (scale_by_step(0.5), scale_by_step(lambda step: 0.25 * step)):
        scaled, state = transform.update(updates, transform.init(updates), step=2)
        assert {x.dtype for x in scaled.values()} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
        assert (scaled["half"] == -0.5).all() and scaled["full"] == -0.5
        assert state == transform.init(updates)


@MODES
def test_a_skipping_worker_contributes_a_zero_to_the_averaged_gradient(mode):
    def loss(params, model_state, batch, key):
        return params @ batch, ({"steps": model_state["steps"] + 1}, {})

    layout = Layout(2, 4, weights=range(1, 9), rates=0.5)
    grad_fn = gradients(loss, stateful=True)
    method = jaxlocal.data_parallel(grad_fn, optax.sgd(1.0), worker_map=mode)
    round_fn = problems.on_one_device(method, layout)
    state = round_fn.init(jnp.ones(2), jax.random.key(0), {"steps": jnp.int32(0)})
    batches = np.random.default_rng(0).normal(size=(1, 2, 4, 2)).astype(np.float32)
    state, info = round_fn(state, batches)
    active = np.asarray(info.worker["active"])[0]
    assert 0 < active.sum() < 8
    # All workers take the step, and the shares of the active ones are not made to sum to one.
    update = -np.einsum("dn,dnp->p", layout.weight * active, batches[0])
    np.testing.assert_allclose(state.params, np.broadcast_to(1 + update, (2, 4, 2)), rtol=1e-5)
    # The skipping workers did nothing else.
    np.testing.assert_array_equal(state.model_state["steps"], active)
    losses = active * batches[0].sum(axis=-1)
    np.testing.assert_allclose(info.worker["loss"][0], losses, rtol=1e-5)


def test_any_mixer_may_average_the_gradients():
    layout = Layout(2, 2, weights=[1, 3, 2, 2])
    optimizer = optax.sgd(1.0)
    step = averaged_gradients(gradients(constant_gradient), optimizer, mixing.hub_mean())
    method = Method(step, NOTHING, optimizer, periods.constant(1))
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=(2, 2)))
    state = round_fn.init(jnp.zeros(2), jax.random.key(0))
    batches = np.random.default_rng(0).normal(size=(1, 2, 2, 2)).astype(np.float32)
    state, _ = round_fn(state, batches)
    share = np.array([[0.25, 0.75], [0.5, 0.5]])
    expected = -np.einsum("dn,dnp->dp", share, batches[0])
    np.testing.assert_allclose(state.params, np.stack([expected] * 2, axis=1), rtol=1e-5)


@pytest.mark.optimized
@pytest.mark.parametrize(("mode", "mesh"), [("vmap", (1, 1)), ("map", (1, 4))])
def test_indices_are_looked_up_in_the_pool(mode, mesh):
    layout, random = Layout(1, 4), np.random.default_rng(0)
    pool = {"inputs": random.normal(size=(20, 3)), "targets": random.normal(size=20)}
    pool = jax.tree.map(np.float32, pool)
    index = random.integers(20, size=(3, 1, 4, 5)).astype(np.int32)
    examples = jax.tree.map(lambda leaf: leaf[index], pool)
    options = {"worker_map": mode}
    given = steps_only(problems.grad_fn, optax.sgd(0.1), layout, mesh, **options)
    looked_up = steps_only(problems.grad_fn, optax.sgd(0.1), layout, mesh, pool, **options)
    ends = [
        problems.vectors(fn(fn.init(problems.START, jax.random.key(0)), batches)[0].params)
        for fn, batches in ((given, examples), (looked_up, index))
    ]
    np.testing.assert_array_equal(*ends)


def test_without_a_pool_a_batch_is_itself():
    batch = {"x": np.arange(3)}
    assert fetch((), batch) is batch
    pool = {"x": np.arange(10) * 2, "y": np.arange(20).reshape(10, 2)}
    got = fetch(pool, np.array([3, 1, 3]))
    np.testing.assert_array_equal(got["x"], [6, 2, 6])
    np.testing.assert_array_equal(got["y"], [[6, 7], [2, 3], [6, 7]])


@MODES
def test_every_worker_and_step_has_its_own_key_for_its_gradient(mode):
    def loss(params, model_state, batch, key):
        drawn = jax.random.bits(key)
        return params @ batch, (model_state, {"drawn": drawn})

    grad_fn, layout = gradients(loss, stateful=True), Layout(2, 4)
    round_fn = steps_only(grad_fn, optax.sgd(0.1), layout, (2, 1), worker_map=mode)
    _, info = round_fn(round_fn.init(jnp.ones(2), jax.random.key(0)), ones(layout, 16))
    drawn = np.asarray(info.worker["drawn"])
    assert drawn.dtype == np.uint32 and len(np.unique(drawn)) == 16 * 8
    key = jaxlocal.parallel.keys.stream_key(
        jax.random.key(0), jaxlocal.parallel.keys.GRADIENT, 9, 5
    )
    assert drawn[9, 1, 1] == jax.random.bits(key)


def test_bits_are_of_one_workers_tree():
    tree = {
        "half": jax.ShapeDtypeStruct((2, 4, 3, 5), jnp.bfloat16),
        "full": jax.ShapeDtypeStruct((2, 4), jnp.float32),
    }
    assert model_bits(tree) == 16 * 15 + 32 and isinstance(model_bits(tree), int)
    assert model_bits(()) == 0


def test_local_steps_send_nothing_and_averaged_ones_their_gradient():
    state = steps_only(problems.grad_fn, optax.sgd(0.1), HALF).shapes(problems.START)
    local = local_step(problems.grad_fn, optax.sgd(0.1))
    assert local.steps == 1 and local.communication(state) == []
    averaged = averaged_gradients(problems.grad_fn, optax.sgd(0.1), mixing.mean())
    assert message_bits(averaged.communication(state), HALF) == MessageBits(
        workers=4 * 32, hubs=4 * 32
    )


def test_an_unknown_worker_map_is_refused():
    with pytest.raises(ConfigurationError, match=re.escape("unknown worker map 'loop'")):
        local_step(problems.grad_fn, optax.sgd(0.1), worker_map="loop")
