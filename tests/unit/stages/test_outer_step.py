"""Outer optimizers: SlowMo and DiLoCo against float64 loops, and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import reference_outer

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh, periods
from jaxlocal.communication import mixing
from jaxlocal.stages.outer_step import outer_step
from jaxlocal.types import MessageBits

STEPS = 24
CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64 rounds at 1e-16
START = np.append(problems.START["weight"], problems.START["bias"])
GRID = Layout(2, 4, weights=[1, 2, 3, 4, 4, 3, 2, 1])


def decaying(step):
    return 0.1 / (1 + 0.05 * step)


def heavy_ball():
    return optax.chain(optax.trace(0.8), jaxlocal.scale_by_step(decaying))


def run(method, layout=GRID, mesh=(1, 1)):
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=mesh))
    batches = problems.make_batches(layout, STEPS)
    lengths = list(periods.lengths(method.period, STEPS))
    return problems.trajectory(round_fn, batches, lengths)[0], batches, lengths


@pytest.mark.parametrize(
    ("at_sync", "mesh", "alpha", "beta"),
    [("keep", (1, 1), 1.0, 0.7), ("average", (2, 2), 0.8, 0.5), ("reset", (2, 4), 1.2, 0.6)],
)
def test_slowmo(at_sync, mesh, alpha, beta):
    outer = optax.sgd(alpha, momentum=beta)
    with jax.enable_x64(True):
        method = jaxlocal.slowmo(
            problems.grad_fn,
            heavy_ball(),
            learning_rate=decaying,
            period=5,
            outer_optimizer=outer,
            optimizer_state=at_sync,
        )
        models, batches, lengths = run(method, mesh=mesh)
    expected = reference_outer.slowmo(
        problems.numpy_gradient(batches), START, decaying, lengths, GRID.weight.reshape(-1),
        0.8, alpha, beta, at_sync,
    )  # fmt: skip
    assert lengths == [5, 5, 5, 5, 4]
    np.testing.assert_allclose(models, expected, **CLOSE)


@pytest.mark.parametrize(
    ("at_sync", "mesh", "alpha", "beta"),
    [("keep", (1, 1), 0.7, 0.9), ("average", (1, 4), 0.5, 0.6), ("reset", (2, 4), 0.9, 0.8)],
)
def test_diloco(at_sync, mesh, alpha, beta):
    outer = optax.sgd(alpha, momentum=beta, nesterov=True)
    with jax.enable_x64(True):
        rule = periods.post_local(6, 5)
        method = jaxlocal.diloco(
            problems.grad_fn,
            heavy_ball(),
            period=rule,
            outer_optimizer=outer,
            optimizer_state=at_sync,
        )
        models, batches, lengths = run(method, mesh=mesh)
    expected = reference_outer.diloco(
        problems.numpy_gradient(batches), START, decaying, lengths, GRID.weight.reshape(-1),
        0.8, alpha, beta, at_sync,
    )  # fmt: skip
    np.testing.assert_allclose(models, expected, **CLOSE)


def test_the_defaults_are_the_papers():
    with jax.enable_x64(True):
        slow, batches, lengths = run(
            jaxlocal.slowmo(problems.grad_fn, heavy_ball(), learning_rate=decaying, period=6)
        )
        outer, _, _ = run(jaxlocal.diloco(problems.grad_fn, heavy_ball(), period=6))
    loop = (problems.numpy_gradient(batches), START, decaying, lengths, GRID.weight.reshape(-1))
    np.testing.assert_allclose(slow, reference_outer.slowmo(*loop, 0.8, 1.0, 0.7, "keep"), **CLOSE)
    np.testing.assert_allclose(outer, reference_outer.diloco(*loop, 0.8, 0.7, 0.9), **CLOSE)


@functools.cache
def local_models(at_sync):
    with jax.enable_x64(True):
        return run(
            jaxlocal.local_sgd(problems.grad_fn, heavy_ball(), period=5, optimizer_state=at_sync)
        )[0]


@pytest.mark.parametrize("at_sync", ["keep", "average", "reset"])
@pytest.mark.parametrize("name", ["diloco", "slowmo"])
def test_an_outer_step_of_one_is_local_sgd(name, at_sync):
    options = {"outer_optimizer": optax.sgd(1.0), "optimizer_state": at_sync}
    if name == "slowmo":
        options["learning_rate"] = decaying
    with jax.enable_x64(True):
        method = getattr(jaxlocal, name)(problems.grad_fn, heavy_ball(), period=5, **options)
        models, _, _ = run(method)
    np.testing.assert_allclose(models, local_models(at_sync), **CLOSE)


def test_slowmo_at_a_constant_rate_is_diloco_with_heavy_ball():
    """SlowMo divides by η before its linear buffer and multiplies by it after: η cancels."""
    outer, inner = optax.sgd(0.9, momentum=0.6), optax.sgd(0.05)
    with jax.enable_x64(True):
        slow, _, _ = run(
            jaxlocal.slowmo(
                problems.grad_fn, inner, learning_rate=0.05, period=4, outer_optimizer=outer
            )
        )
        other, _, _ = run(jaxlocal.diloco(problems.grad_fn, inner, period=4, outer_optimizer=outer))
    np.testing.assert_allclose(slow, other, **CLOSE)


def test_the_outer_optimizer_may_follow_the_steps_of_the_run():
    by_step = jaxlocal.scale_by_step(lambda step: jnp.where(step == 3, 1.0, 0.0))
    method = jaxlocal.diloco(problems.grad_fn, optax.sgd(0.1), period=4, outer_optimizer=by_step)
    models, _, _ = run(method)
    assert not np.array_equal(models[4], models[0])  # the last step of the first round is step 3
    for later in range(8, STEPS + 1, 4):
        np.testing.assert_array_equal(models[later], models[4])


def test_all_workers_restart_from_the_anchor_and_it_is_one():
    method = jaxlocal.diloco(problems.grad_fn, optax.sgd(0.1), period=4)
    round_fn = RoundFn(method, GRID)
    state = round_fn.init(problems.START, jax.random.key(0))
    state, _ = round_fn(state, problems.make_batches(GRID, 4))
    for name, anchor in state.anchor.items():
        assert anchor.is_fully_replicated and anchor.shape == np.shape(problems.START[name])
        assert (np.asarray(state.params[name]) == np.asarray(anchor)).all()


def test_the_anchor_of_half_precision_parameters_is_float32():
    """A step of 2⁻¹⁰ at 1 is lost in bfloat16, whose neighbours are 2⁻⁸ apart, and adds up here."""
    grad_fn = jaxlocal.gradients(lambda w, batch, key: (w.astype(jnp.float32) * batch).sum())
    method = jaxlocal.diloco(
        grad_fn, optax.sgd(2.0**-6), period=1, outer_optimizer=optax.sgd(2.0**-4)
    )
    round_fn = problems.on_one_device(method, Layout(1, 2))
    state = round_fn.init(jnp.ones((), jnp.bfloat16), jax.random.key(0))
    for _ in range(3):
        state, _ = round_fn(state, np.ones((1, 1, 2, 1), np.float32))
    assert state.anchor.dtype == jnp.float32 and state.params.dtype == jnp.bfloat16
    assert float(state.anchor) == 1 - 3 * 2.0**-10


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("make", ["diloco", "slowmo"])
def test_workers_that_do_not_move_leave_the_anchor_where_it_is(make, dtype):
    """To the bit, with unequal weights, in a warm-up from a learning rate of zero too."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 40)
    grad_fn = jaxlocal.gradients(lambda w, batch, key: (0 * w * batch.astype(w.dtype)).sum())
    method = {
        "diloco": lambda: jaxlocal.diloco(grad_fn, optax.sgd(rate), period=3),
        "slowmo": lambda: jaxlocal.slowmo(grad_fn, optax.sgd(rate), learning_rate=rate, period=3),
    }[make]()
    round_fn = problems.on_one_device(method, Layout(1, 3, weights=[1, 2, 4]))
    begin = jnp.asarray(np.random.default_rng(0).normal(size=50), dtype)
    state = round_fn.init(begin, jax.random.key(0))
    offset = state._replace(anchor=state.anchor * (1 + 2.0**-10))  # between two bfloat16
    expected = np.asarray(offset.anchor)
    state = offset._replace(
        params=jnp.broadcast_to(offset.anchor.astype(dtype), offset.params.shape)
    )
    for _ in range(12):
        state, _ = round_fn(state, np.ones((3, 1, 3, 50), np.float32))
    np.testing.assert_array_equal(np.asarray(state.anchor), expected)


def test_slow_momentum_survives_warm_restarts():
    """Half-cosines to zero every 12 steps do not change a momentum in units of the gradient."""
    cosine = lambda step: 0.05 * (1 + jnp.cos(jnp.pi * (step % 12) / 12))
    rate = lambda step: jnp.where(step % 12 == 11, 0.0, cosine(step))
    inner = jaxlocal.scale_by_step(rate)
    outer = optax.sgd(1.0, momentum=0.7)
    models, _, _ = run(
        jaxlocal.slowmo(
            problems.grad_fn, inner, learning_rate=rate, period=4, outer_optimizer=outer
        )
    )
    local, _, _ = run(jaxlocal.local_sgd(problems.grad_fn, inner, period=4))
    spread_of = lambda x: np.abs(x[-1] - np.mean(x[-1], axis=0)).max() + np.abs(x[-1]).max()
    assert spread_of(models) < 3 * spread_of(local)


def test_messages_are_the_model_and_the_averaged_state():
    model = 32 * len(START)
    for option, factor in [("keep", 1), ("average", 2), ("reset", 1)]:
        method = jaxlocal.diloco(
            problems.grad_fn,
            optax.sgd(0.1, momentum=0.9),
            period=4,
            optimizer_state=option,
        )
        round_fn = problems.on_one_device(method, Layout(1, 4))
        inner, outer = round_fn.stage_bits(
            round_fn.shapes(jax.tree.map(jnp.float32, problems.START))
        )
        assert (inner, outer) == (MessageBits(), MessageBits(workers=factor * model))


def test_there_is_no_anchor_without_consensus():
    with pytest.raises(ConfigurationError, match=r"all workers common.*\('workers',\)"):
        outer_step(mixing.hub_mean(), optax.sgd(1.0))


def test_a_learning_rate_of_zero_at_the_end_of_a_round_loses_nothing():
    rate = lambda step: jnp.where(step % 4 == 3, 0.0, 0.1)
    inner = jaxlocal.scale_by_step(rate)
    outer = optax.sgd(1.0)
    slow, _, _ = run(
        jaxlocal.slowmo(
            problems.grad_fn, inner, learning_rate=rate, period=4, outer_optimizer=outer
        )
    )
    local, _, _ = run(jaxlocal.local_sgd(problems.grad_fn, inner, period=4))
    np.testing.assert_allclose(slow, local, rtol=2e-6, atol=2e-6)  # float32 rounds at 6e-8


def test_a_learning_rate_of_zero_moves_nothing():
    method = jaxlocal.slowmo(problems.grad_fn, optax.sgd(0.0), learning_rate=0.0, period=4)
    models, _, _ = run(method)
    np.testing.assert_array_equal(models, np.broadcast_to(models[:1], np.shape(models)))
