"""The end of a round: parameters are averaged, optimizer states kept, averaged or reset."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh, periods
from jaxlocal.communication import mixing
from jaxlocal.communication.accounting import message_bits, model_bits
from jaxlocal.communication.topology import hub_graph, mixing_matrix
from jaxlocal.stages.compose import NOTHING
from jaxlocal.stages.local_step import local_step
from jaxlocal.stages.sync import sync
from jaxlocal.types import MessageBits, Method

GRID = Layout(2, 2, weights=[1, 2, 3, 4])
SCHEDULE = optax.cosine_decay_schedule(0.1, 100)
ADAMW = optax.adamw(SCHEDULE)


def syncing(mixer, optimizer=ADAMW, option="keep", layout=GRID, mesh=(1, 1), anchored=False):
    stage = sync(mixer, optimizer_state=option, optimizer=optimizer)._replace(anchored=anchored)
    method = Method(local_step(problems.grad_fn, optimizer), stage, optimizer, periods.constant(3))
    return RoundFn(method, layout, make_mesh(layout, shape=mesh))


def midway(round_fn, start=problems.START):
    """A state after three steps in which no two workers are equal."""
    random, state = np.random.default_rng(0), round_fn.init(start, jax.random.key(0))

    def unlike(leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            return np.full(leaf.shape, 3, leaf.dtype)
        return random.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)

    params, opt_state = jax.tree.map(unlike, (state.params, state.opt_state))
    return state._replace(params=params, opt_state=opt_state, step=np.int32(3))


def on_host(tree):
    return jax.tree.map(lambda x: np.asarray(x).copy(), tree)


def averaged(tree, weight=GRID.weight):
    """Σ a_i x_i for every worker, float leaves alone."""

    def one(leaf):
        if not np.issubdtype(leaf.dtype, np.floating):
            return leaf
        return np.broadcast_to(np.einsum("dn,dn...->...", weight, leaf), leaf.shape)

    return jax.tree.map(one, tree)


def assert_close(got, expected):
    # Float32 rounds at 6e-8.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, on_host(got), expected)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_kept_optimizer_state_stays_to_the_bit(mesh):
    round_fn = syncing(mixing.mean(), mesh=mesh)
    state = midway(round_fn)
    params, opt_state = on_host(state.params), on_host(state.opt_state)
    state, info = round_fn.end_round(state)
    assert_close(state.params, averaged(params))
    assert_equal(state.opt_state, opt_state)
    assert int(state.step) == 3 and not info.worker and not info.common


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_averaged_optimizer_state_is_averaged_in_its_numbers_and_kept_in_its_counts(mesh):
    round_fn = syncing(mixing.mean(), option="average", mesh=mesh)
    state = midway(round_fn)
    # Counts that differ, as with workers that skip steps, are not averaged.
    adam = state.opt_state[0]._replace(count=np.array([[1, 2], [3, 4]], np.int32))
    state = state._replace(opt_state=(adam, *state.opt_state[1:]))
    before = on_host(state.opt_state)
    state, _ = round_fn.end_round(state)
    assert_close(state.opt_state, averaged(before))
    assert state.opt_state[0].count.dtype == np.int32
    np.testing.assert_array_equal(state.opt_state[0].count, [[1, 2], [3, 4]])


def test_state_is_averaged_by_the_mixer_of_the_parameters():
    round_fn = syncing(mixing.hub_mean(), option="average")
    state = midway(round_fn)
    before = on_host(state.opt_state[0].mu["weight"])
    state, _ = round_fn.end_round(state)
    share = np.array([[1 / 3, 2 / 3], [3 / 7, 4 / 7]])
    expected = np.einsum("dn,dnp->dp", share, before)
    assert_close(state.opt_state[0].mu["weight"], np.stack([expected] * 2, axis=1))


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_reset_optimizer_state_is_fresh_but_for_the_schedules_count(mesh):
    round_fn = syncing(mixing.mean(), option="reset", mesh=mesh)
    state, _ = round_fn.end_round(midway(round_fn))
    adam, _, scheduled = state.opt_state
    assert_equal(adam, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), adam))
    assert isinstance(scheduled, optax.ScaleByScheduleState)
    np.testing.assert_array_equal(scheduled.count, np.full(GRID.shape, 3))


def test_a_reset_keeps_the_count_of_a_schedule_at_any_depth():
    optimizer = optax.chain(
        optax.masked(optax.trace(0.9), {"weight": True, "bias": False}),
        optax.chain(optax.clip(1.0), optax.chain(optax.scale_by_schedule(SCHEDULE))),
    )
    round_fn = syncing(mixing.mean(), optimizer, "reset")
    state, _ = round_fn.end_round(midway(round_fn))
    np.testing.assert_array_equal(state.opt_state[1][1][0].count, np.full(GRID.shape, 3))
    trace = state.opt_state[0].inner_state.trace["weight"]
    np.testing.assert_array_equal(trace, np.zeros((2, 2, problems.FEATURES)))


def test_a_reset_starts_from_the_averaged_parameters():
    """The initial state of this optimizer holds the parameters, as a moving average does."""
    keep = optax.GradientTransformation(
        lambda params: {"start": jax.tree.map(jnp.asarray, params)},
        lambda updates, state, params=None: (jax.tree.map(lambda u: -0.1 * u, updates), state),
    )
    round_fn = syncing(mixing.mean(), keep, "reset")
    state, _ = round_fn.end_round(midway(round_fn))
    assert_equal(state.opt_state["start"], on_host(state.params))


def test_an_anchor_moves_with_what_is_common_to_all_workers():
    uneven = mixing_matrix(hub_graph("path", 3), np.full(3, 1 / 3))
    path = Layout(3, 1)
    for mixer, layout, moves in [
        (mixing.mean(), GRID, True),
        (mixing.hub_mean(), GRID, False),
        (mixing.hub_diffusion(uneven), path, False),
    ]:
        round_fn = syncing(mixer, layout=layout, anchored=True)
        state, _ = round_fn.end_round(midway(round_fn))
        first = jax.tree.map(lambda x: np.asarray(x)[0, 0], state.params)
        assert_equal(state.anchor, first if moves else jax.tree.map(np.float32, problems.START))


def test_parameters_and_state_of_half_precision_keep_their_types():
    layout = Layout(1, 16)
    optimizer = optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16)
    round_fn = syncing(mixing.mean(), optimizer, "average", layout)
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), problems.START)
    state = midway(round_fn, start)
    before = on_host(state.params)
    state, _ = round_fn.end_round(state)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    wide = averaged(jax.tree.map(np.float32, before), layout.weight)
    # One rounding at the end, of 8 significant bits.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.float32(a), b, rtol=2**-8), state.params, wide
    )


def test_a_round_that_ends_with_nothing_ends_without_a_change():
    method = Method(local_step(problems.grad_fn, ADAMW), NOTHING, ADAMW, periods.constant(3))
    round_fn = problems.on_one_device(method, GRID)
    state = midway(round_fn)
    before = on_host((state.params, state.opt_state))
    state, _ = round_fn.end_round(state)
    assert_equal((state.params, state.opt_state), before)


def test_the_message_is_the_parameters_and_the_state_that_is_averaged():
    state = syncing(mixing.mean()).shapes(problems.START)
    bits = lambda option: message_bits(
        sync(mixing.mean(), optimizer_state=option, optimizer=ADAMW).communication(state), GRID
    )
    model = (problems.FEATURES + 1) * 32
    assert model_bits(state.params) == model
    assert bits("keep") == bits("reset") == MessageBits(workers=model, hubs=model)
    # Two moments as large as the model; counts are not sent.
    assert bits("average") == MessageBits(workers=3 * model, hubs=3 * model)
    assert sync(mixing.mean()).steps == 0 and NOTHING.communication(state) == []


def test_an_unknown_treatment_of_optimizer_state_is_refused():
    message = "unknown optimizer state option 'avarage'; did you mean 'average'"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        sync(mixing.mean(), optimizer_state="avarage")


def test_a_reset_without_the_optimizer_is_an_error_at_build_time():
    with pytest.raises(ConfigurationError, match="needs the optimizer"):
        sync(mixing.mean(), optimizer_state="reset")
