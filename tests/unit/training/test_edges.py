"""Inputs at the edge: numbers for arrays, half precision, and what is refused at build time."""

import compilations
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, periods
from jaxlocal.training import run
from jaxlocal.training.dispatching import dispatches
from jaxlocal.training.evaluation import Evaluation
from jaxlocal.training.pieces import Piece

grad_fn = jaxlocal.gradients(lambda w, batch, key: jnp.square(jnp.tanh(w) - batch).mean())


def plain(layout=Layout(), period=3, optimizer=None):  # noqa: B008
    method = jaxlocal.local_sgd(grad_fn, optimizer or optax.sgd(0.1), period=period)
    return RoundFn(method, layout)


def test_parameters_that_are_python_numbers_compile_no_more_programs():
    round_fn = plain(Layout(workers_per_hub=2), 1, optax.adam(0.1))
    state = round_fn.init(0.5, jax.random.key(0), {"scale": 1.0})
    with compilations.counted() as compiled:
        for _ in range(3):
            state, _ = round_fn(state, np.ones((1, 1, 2), np.float32))
    assert len(compiled) == 1


def test_rounds_that_are_no_multiple_of_tau_are_refused():
    matrix = np.full((2, 2), 0.5)
    method = jaxlocal.mll_sgd(
        grad_fn, optax.sgd(0.1), matrix=matrix, local_steps=2, hub_period=periods.constant(5)
    )
    with pytest.raises(ConfigurationError, match="5 steps .* the 2 steps"):
        list(dispatches(RoundFn(method, Layout(2, 2)), 10))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_metrics_in_half_precision_are_summed_in_float32(dtype):
    data = np.random.default_rng(0).uniform(0, 100, 10_000).astype(dtype)
    round_fn = plain(Layout(workers_per_hub=8))
    state = round_fn.init(jnp.zeros(3), jax.random.key(0))
    got = Evaluation(round_fn, lambda params, model_state, batch: {"mean": batch}, data)(state)
    np.testing.assert_allclose(got["mean"], data.astype(np.float64).mean(), rtol=1e-5)


@pytest.mark.parametrize("arguments", [(np.ones(4), np.array([], int)), ()])
def test_an_evaluation_of_no_examples_is_refused(arguments):
    with pytest.raises(ConfigurationError, match="got 0"):
        Evaluation(plain(), lambda params, model_state, batch: {}, *arguments)


@pytest.mark.parametrize(
    ("every", "message"),
    [(-2, "≥ 0, got -2"), (2.0, "integer, got 2.0"), ("2", "integer, got '2'")],
)
def test_a_distance_between_measurements_is_an_integer_that_is_not_negative(every, message):
    with pytest.raises(ConfigurationError, match=message):
        list(dispatches(plain(), 6, every))


def test_several_root_keys_are_refused():
    with pytest.raises(ConfigurationError, match=r"\(2,\) keys"):
        plain().init(jnp.zeros(()), jax.random.split(jax.random.key(0)))


def test_workers_that_always_step_draw_nothing():
    """Rates of 1 are known when the round is compiled: no random numbers in the step."""
    for rates, draws in [(1.0, False), (0.5, True)]:
        round_fn = plain(Layout(workers_per_hub=2, rates=rates))
        state = round_fn.init(jnp.zeros(()), jax.random.key(0))
        batches, step = jnp.ones((1, 1, 2)), round_fn._programs.get(Piece(1, False), state)
        text = str(jax.make_jaxpr(step)(state, batches, round_fn.context))
        assert ("threefry2x32" in text or "random_bits" in text) == draws


def carried(params, batch, key):
    """A loss whose loop starts from a constant, as recurrent networks do."""
    start = jnp.zeros(())
    last, _ = jax.lax.scan(lambda c, x: (jnp.tanh(c + x * params), None), start, batch)
    return (last - 1) ** 2


@pytest.mark.parametrize("name", ["local_sgd", "data_parallel"])
def test_a_loss_that_carries_a_constant_trains_on_every_mesh(name):
    method = getattr(jaxlocal, name)(jaxlocal.gradients(carried), optax.sgd(0.1))
    layout, batches = Layout(2, 4), np.random.default_rng(0).normal(size=(8, 2, 4, 5))
    models = []
    for shape in [(1, 1), (2, 4)]:
        round_fn = RoundFn(method, layout, jaxlocal.make_mesh(layout, shape=shape))
        state, info = round_fn(round_fn.init(0.5, jax.random.key(0)), batches, length=8)
        models.append(np.asarray(state.params))
        expected = jax.vmap(carried, (None, 0, None))(0.5, batches[0].reshape(8, 5), None)
        np.testing.assert_allclose(info.worker["loss"][0].ravel(), expected, rtol=1e-5)
    np.testing.assert_allclose(*models, rtol=1e-5)


def test_metrics_that_carry_a_constant_are_evaluated():
    round_fn = plain(Layout(workers_per_hub=4))
    state = round_fn.init(jnp.ones(()), jax.random.key(0))

    def metrics(params, model_state, batch):
        total, _ = jax.lax.scan(lambda c, x: (c + x, None), jnp.zeros(()), batch)
        return {"total": jnp.broadcast_to(total, batch.shape)}

    assert Evaluation(round_fn, metrics, np.ones(8), batch_size=2)(state)["total"] > 0


@pytest.mark.optimized
def test_a_round_of_several_chunks_runs_inside_jit():
    round_fn, batches = plain(Layout(workers_per_hub=2), period=6), jnp.ones((6, 1, 2))
    start = lambda: round_fn.init(jnp.ones(()), jax.random.key(0))
    once, inside = round_fn(start(), batches), jax.jit(round_fn)(start(), batches)
    np.testing.assert_array_equal(once[0].params, inside[0].params)
    np.testing.assert_allclose(once[1].worker["loss"], inside[1].worker["loss"], rtol=1e-6)


@pytest.mark.parametrize("name", ["local_sgd", "data_parallel"])
def test_optimizers_are_given_the_loss(name):
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    method = getattr(jaxlocal, name)(grad_fn, optimizer)
    round_fn = RoundFn(method, Layout(workers_per_hub=2))
    state = round_fn.init(jnp.ones(()), jax.random.key(0))
    state, info = round_fn(state, jnp.ones((1, 1, 2)))
    best = [s for s in state.opt_state if hasattr(s, "best_value")][0].best_value
    np.testing.assert_allclose(best, info.worker["loss"][0])


@pytest.mark.parametrize("hubs", [2.0, "2", 0])
def test_a_grid_is_counted_in_integers(hubs):
    with pytest.raises(ConfigurationError, match="hubs must be an integer"):
        Layout(hubs, 2)


def test_weights_that_overflow_or_vanish():
    np.testing.assert_allclose(Layout(1, 4, weights=[1e308] * 4).weight, 0.25)
    with pytest.raises(ConfigurationError, match="too far apart"):
        Layout(1, 2, weights=[1e-300, 1])


@pytest.mark.parametrize("name", ["local_sgd", "data_parallel"])
def test_a_users_gradient_function_may_report_nothing(name):
    own = lambda params, model_state, batch, key: (params - batch, model_state, {})
    round_fn = RoundFn(getattr(jaxlocal, name)(own, optax.sgd(0.5)), Layout(workers_per_hub=2))
    state = round_fn.init(jnp.zeros(()), jax.random.key(0))
    state, info = round_fn(state, jnp.ones((1, 1, 2)))
    np.testing.assert_array_equal(state.params, 0.5)
    assert list(info.worker) == ["active"]


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "a", None, True])
def test_a_chunk_is_an_integer_of_at_least_one_step(wrong):
    with pytest.raises(ConfigurationError, match=f"max_chunk must be an integer .* got {wrong!r}"):
        RoundFn(plain().method, Layout(), max_chunk=wrong)


def test_shapes_are_refused_where_a_program_reads_arrays():
    round_fn, key = plain(), jax.random.key(0)
    state = round_fn.init(0.5, key, {"scale": 1.0})
    shapes = round_fn.shapes(0.5, {"scale": 1.0})
    number, batches = jax.ShapeDtypeStruct((), jnp.float32), np.ones((3, 1, 1), np.float32)
    steps = jax.ShapeDtypeStruct((3, 1, 1), jnp.float32)
    for use in (
        lambda: round_fn.init(number, key),
        lambda: round_fn.init(0.5, key, {"scale": number}),
        lambda: round_fn.init(0.5, jax.eval_shape(lambda: key)),
        lambda: round_fn(shapes, batches),
        lambda: round_fn(state, steps),
        lambda: round_fn.local_steps(shapes, batches),
        lambda: round_fn.local_steps(state, steps),
        lambda: round_fn.end_round(shapes),
        lambda: round_fn.mean(shapes),
        lambda: round_fn.consensus_distance(shapes),
        lambda: next(run(round_fn, shapes, lambda start, steps: batches, 3)),
    ):
        with pytest.raises(ConfigurationError, match="arrays are needed here, got shapes"):
            use()
    assert len(round_fn.lower(shapes, steps)) == 1


def test_integers_that_jax_would_wrap_are_refused():
    """2⁴⁰ would be the class 0."""
    round_fn, large = plain(), np.array([0, 2**40, 1])[:, None, None]
    state = round_fn.init(0.5, jax.random.key(0))
    refused = pytest.raises(ConfigurationError, match="from 0 to 1099511627776 do not fit int32")
    for use in (
        lambda: round_fn(state, {"x": np.ones((3, 1, 1)), "y": large}),
        lambda: round_fn.local_batches(large),
        lambda: round_fn.init(0.5, jax.random.key(0), {"count": large}),
        lambda: RoundFn(round_fn.method, Layout(), data=large),
        lambda: Evaluation(round_fn, lambda *_: {}, large),
        lambda: Evaluation(round_fn, lambda *_: {}, source=list(large))(state),
    ):
        with refused:
            use()
    assert round_fn.local_batches(large % 2**31).dtype == jnp.int32
