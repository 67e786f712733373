"""Running averages of the model are those of a slow loop, whatever the method, and send nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import registry
from saved_states import as_numbers

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn
from jaxlocal.communication import topology
from jaxlocal.training import RunningAverage, running_average, with_running_averages

AVERAGES = {
    "ema": RunningAverage(decay=0.9),
    "late_ema": RunningAverage(decay=0.8, start=5),
    "swa": RunningAverage(start=3),
    "polyak": RunningAverage(),
}


def by_loop(average, ends, models):
    """Σ_s β^(T−s) x(s) / Σ_s β^(T−s) over the steps s from the start to the last end T, where x(s)
    is the model at the end of the round that has step s; before the start the newest model."""
    total, weights, last = 0.0, 0.0, 0
    for end, model in zip(ends, np.asarray(models, np.float64), strict=True):
        for step in range(last + 1, end + 1):
            if step > average.start:
                weight = average.decay ** (ends[-1] - step)
                total, weights = total + weight * model, weights + weight
        last = end
    return total / weights if weights else np.asarray(models[-1], np.float64)


@pytest.mark.parametrize("name", AVERAGES)
def test_shares_of_the_newest_model_add_up_to_the_weights_of_a_loop(name):
    average, share = AVERAGES[name], jax.jit(AVERAGES[name].share)
    ends = np.cumsum([1, 1, 4, 2, 7, 1, 16, 3])
    models = np.random.default_rng(0).normal(size=(len(ends), 5))
    running, before = np.full(5, 9.0), 0  # the initial model has no weight
    for number, end in enumerate(ends, 1):
        running += float(share(jnp.int32(before), jnp.int32(end))) * (models[number - 1] - running)
        expected = by_loop(average, list(ends[:number]), models[:number])
        np.testing.assert_allclose(running, expected, rtol=1e-5)  # shares are float32
        before = end


def test_steps_one_by_one_are_the_unbiased_moving_average_of_optax():
    average, reference = RunningAverage(decay=0.999), optax.ema(0.999, debias=True)
    values = jnp.asarray(np.random.default_rng(1).normal(size=50), jnp.float32)
    state, running = reference.init(values[0]), jnp.float32(0)
    for step, value in enumerate(values):
        with jax.numpy_dtype_promotion("standard"):
            expected, state = reference.update(value, state)
        share = average.share(jnp.int32(step), jnp.int32(step + 1))
        running = running + share * (value - running)
    # 1 − 0.999^50 loses digits where optax computes it.
    np.testing.assert_allclose(running, expected, rtol=1e-4)


def test_shares_are_exact_late_in_a_long_run_of_slow_averages():
    now = jnp.int32(10_000_000)
    share = RunningAverage(decay=1 - 1e-6).share(now - 1, now)
    np.testing.assert_allclose(share, 1e-6 / (1 - (1 - 1e-6) ** 1e7), rtol=1e-5)
    np.testing.assert_allclose(RunningAverage().share(now - 16, now), 1.6e-6, rtol=1e-6)


GRID = Layout(4, 2, weights=1 + np.arange(8) % 3)
ONE_HUB = Layout(1, 8, weights=1 + np.arange(8) % 3)
RING = topology.mixing_matrix(topology.hub_graph("ring", 4), GRID.hub_weight)
METHODS = {
    # Rounds of varying length, and models that differ at their ends.
    "local_sgd": (
        lambda g, o: jaxlocal.local_sgd(g, o, period=jaxlocal.periods.of(4)),
        ONE_HUB,
        [3, 2, 1],  # of steps that are dispatched one by one: two programs
    ),
    "mll_sgd": (
        lambda g, o: jaxlocal.mll_sgd(g, o, local_steps=2, hub_period=1, matrix=RING),
        GRID,
        [2, 4, 2],
    ),
    "data_parallel": (jaxlocal.data_parallel, ONE_HUB, [1] * 7),
}


@pytest.mark.optimized  # two programs are compared to the bit
@pytest.mark.parametrize("name", METHODS)
def test_any_method_trains_the_same_and_averages_the_average_model(name):
    build, layout, lengths = METHODS[name]
    method = build(problems.grad_fn, optax.sgd(0.1, momentum=0.9))
    tracked = RoundFn(with_running_averages(method, **AVERAGES), layout)
    plain = RoundFn(method, layout)
    batches = jax.tree.map(np.float32, problems.make_batches(layout, sum(lengths)))
    params = jax.tree.map(np.float32, problems.START)
    state, other = (f.init(params, jax.random.key(0)) for f in (tracked, plain))
    models, ends, start = [], np.cumsum(lengths), 0
    for end in ends:
        part = problems.steps_of(batches, start, end)
        state, _ = tracked(state, part, length=end - start)
        other, _ = plain(other, part, length=end - start)
        models.append(problems.vectors(state.params))
        start = end
    np.testing.assert_array_equal(models[-1], problems.vectors(other.params))
    weights = layout.context().weight.reshape(-1)
    average_models = np.einsum("k,tkp->tp", weights.astype(np.float64), models)
    for own, average in AVERAGES.items():
        expected = by_loop(average, list(ends), average_models)
        running, _ = tracked.mean(running_average(state, own))
        found = np.append(running["weight"], running["bias"])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert tracked.message_bits(state, 8, 2) == plain.message_bits(other, 8, 2)
    assert tracked.collectives(state, 8) == plain.collectives(other, 8)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", registry.METHODS)
def test_every_method_of_the_registry_takes_running_averages(name):
    entry, models = registry.METHODS[name], []
    grad_fn = jaxlocal.gradients(registry.loss, stateful=True)
    method = entry.build(grad_fn, registry.OPTIMIZERS["momentum"])
    for own in (method, with_running_averages(method, polyak=RunningAverage())):
        round_fn = RoundFn(own, entry.layout)
        state = round_fn.init(entry.params(), jax.random.key(0), registry.model_state())
        for number in range(2):
            batches = registry.batches(entry.layout, number * entry.steps, entry.steps)
            state, _ = round_fn(state, batches, length=entry.steps)
            models.append(jax.tree.map(np.float32, as_numbers(state.params)))
    jax.tree.map(np.testing.assert_array_equal, models[:2], models[2:])
    kept = running_average(state, "polyak").params
    halfway = jax.tree.map(lambda one, two: (one + two) / 2, *models[2:])
    assert {x.dtype for x in jax.tree.leaves(kept)} == {
        x.dtype for x in jax.tree.leaves(state.params)
    }
    close = lambda x, y: np.testing.assert_allclose(
        np.float32(x), y, rtol=1e-6 if x.dtype == np.float32 else 2**-8, atol=1e-7
    )
    jax.tree.map(close, kept, halfway)


def test_averages_of_sharded_workers_are_sharded_and_the_same():
    def loss(params, batch, key):
        return jnp.square(batch @ params["matrix"] - 1).mean()

    layout, drawn = Layout(workers_per_hub=2), np.random.default_rng(3).normal
    method = jaxlocal.local_sgd(jaxlocal.gradients(loss), optax.sgd(0.1), period=1)
    method = with_running_averages(method, ema=RunningAverage(decay=0.5))
    params = {"matrix": np.float32(drawn(size=(8, 4)))}
    batches, found = np.float32(drawn(size=(2, 1, 1, 2, 4, 8))), []
    rule = jaxlocal.sharding.by_name([("matrix", jax.P("model"))])
    for shape in ((1, 1, 1), (1, 2, 4)):
        mesh = jaxlocal.make_mesh(layout, shape=shape)
        round_fn = RoundFn(method, layout, mesh, sharding=rule)
        state = round_fn.init(params, jax.random.key(0))
        for batch in batches:
            state, _ = round_fn(state, batch)
        kept = running_average(state, "ema").params["matrix"]
        assert kept.sharding.is_equivalent_to(state.params["matrix"].sharding, kept.ndim)
        found.append(np.asarray(kept))
    assert kept.sharding.shard_shape(kept.shape) == (1, 1, 2, 4)
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_averages_of_parameters_in_half_precision_keep_small_changes():
    average = RunningAverage()
    method = with_running_averages(
        jaxlocal.local_sgd(problems.grad_fn, optax.sgd(0.1), period=1), polyak=average
    )
    shapes = RoundFn(method, ONE_HUB).shapes(
        {"weight": jnp.zeros(3, jnp.bfloat16), "bias": jnp.zeros((), jnp.bfloat16)}
    )
    (kept,) = shapes.memory.outer[-1]
    assert {x.dtype for x in jax.tree.leaves(kept.stacked)} == {np.dtype(np.float32)}
    assert {x.sharding for x in jax.tree.leaves(kept.stacked)} == {shapes.params["bias"].sharding}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RunningAverage(decay=0.0), "must be in (0, 1], got 0.0"),
        (lambda: RunningAverage(decay=1.5), "must be in (0, 1], got 1.5"),
        (lambda: RunningAverage(decay=float("nan")), "must be in (0, 1], got nan"),
        (lambda: RunningAverage(start=-1), "must be an integer of at least 0, got -1"),
        (lambda: RunningAverage(start=2.5), "must be an integer of at least 0, got 2.5"),
        (lambda: with_running_averages("local_sgd"), "running averages are of a Method, got str"),
        (
            lambda: with_running_averages(
                jaxlocal.local_sgd(problems.grad_fn, optax.sgd(0.1)), ema=0.9
            ),
            "ema must be a RunningAverage, got 0.9",
        ),
    ],
)
def test_mistakes_are_told_when_the_method_is_made(make, sentence):
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        make()


def test_an_average_that_a_state_has_not_is_named():
    method = jaxlocal.local_sgd(problems.grad_fn, optax.sgd(0.1))
    params = jax.tree.map(np.float32, problems.START)
    shapes = RoundFn(with_running_averages(method, ema=RunningAverage()), ONE_HUB).shapes(params)
    with pytest.raises(ConfigurationError, match="running average of this state.*emma.*ema"):
        running_average(shapes, "emma")
    with pytest.raises(ConfigurationError, match="running average of this state"):
        running_average(RoundFn(method, ONE_HUB).shapes(params), "ema")
