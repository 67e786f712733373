"""What a compressor leaves out is not lost: the residuals of CSER and of error feedback."""

import functools

import compressed_problem as problem
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh
from jaxlocal.compression import parse

STEPS = 12
# Float64 rounds at 1e-16; models of size one after tens of contracting steps differ by a few of it.
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}
FOUR = Layout(2, 2, [1.0, 3.0, 2.0, 1.5])
OPTIMIZERS = {
    "momentum": optax.sgd(0.02, momentum=0.8),
    "nesterov": optax.sgd(0.02, momentum=0.8, nesterov=True),
    "adamw": optax.adamw(0.02, weight_decay=0.1),
}


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def cser(optimizer, update, reset, period, grad_fn=problem.grad_fn):
    compressors = {"gradient_compressor": parse(update), "reset_compressor": parse(reset)}
    return jaxlocal.cser(grad_fn, optimizer, **compressors, period=period)


def plain_optax(optimizer, batches):
    """The usual loop with optax, on the batches of the first worker."""

    @jax.jit
    def update(params, opt_state, batch):
        grads = jax.grad(problem.loss)(params, batch, None)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = jax.tree.map(jnp.asarray, problem.START)
    opt_state = optimizer.init(params)
    for step in range(STEPS):
        batch = jax.tree.map(lambda leaf, t=step: leaf[t, 0, 0], batches)
        params, opt_state = update(params, opt_state, batch)
    return problem.vectors(params)


@pytest.mark.parametrize(
    ("name", "update", "reset"),
    [
        ("adamw", "sign", "top_k:4"),
        ("nesterov", "grbs:3", "powersgd:1"),
        ("momentum", "powersgd:1", "qsgd:3"),
    ],
)
def test_cser_of_one_worker_is_plain_optax(name, update, reset):
    """x + C(u) + u − C(u) = x + u with any compressor, and the same at a reset."""
    method = cser(OPTIMIZERS[name], update, reset, period=3)
    models = problem.vectors(problem.final_state(method, Layout(), steps=STEPS).params)
    expected = plain_optax(OPTIMIZERS[name], problem.make_batches(Layout(), STEPS))
    np.testing.assert_allclose(models, expected, **ROUNDING)


def pull(params, batch, key):
    """A loss whose gradient is the batch."""
    return sum(jnp.vdot(batch[name], params[name]) for name in params)


@pytest.mark.parametrize(("update", "reset"), [("top_k:4+int8", "sign"), ("powersgd:1", "grbs:3")])
def test_the_mean_of_the_models_moves_by_the_mean_update_with_any_compressor(update, reset):
    """Σ a_i x_i = x_0 − η Σ_t Σ_i a_i g_i(t) over the steps that worker i did not skip."""
    layout = Layout(2, 2, FOUR.weights, rates=[0.4, 0.7])
    method = cser(optax.sgd(0.1), update, reset, period=3, grad_fn=jaxlocal.gradients(pull))
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=(2, 1)), max_chunk=1)
    random = np.random.default_rng(0)
    batches = {
        name: random.normal(size=(STEPS, *layout.shape, *np.shape(start)))
        for name, start in problem.START.items()
    }
    state, active = round_fn.init(problem.START, jax.random.key(0)), []
    for start in range(0, STEPS, 3):
        state, info = round_fn(state, problem.steps_of(batches, start, start + 3))
        active.append(np.asarray(info.worker["active"]))
    active = np.concatenate(active)
    assert 0.2 < active.mean() < 0.8
    gradients = np.stack(
        [problem.vectors(problem.steps_of(batches, t, t + 1)) for t in range(STEPS)]
    )
    taken = np.einsum("i,ti,tip->p", layout.weight.ravel(), active.reshape(STEPS, 4), gradients)
    mean = problem.vectors(round_fn.mean(state)[0])[0]
    np.testing.assert_allclose(mean, problem.START_VECTOR - 0.1 * taken, **ROUNDING)
    assert np.abs(problem.vectors(state.params) - mean).max() > 0.1  # there are errors


def bowl(params, batch, key):
    """½ Σ s (x − t)² over all values."""
    square = lambda name: jnp.sum(batch["scale"][name] * (params[name] - batch[name]) ** 2)
    return 0.5 * sum(square(name) for name in params)


@pytest.fixture(scope="module")
def bowls():
    """One step of batches, and x* = Σ a s t / Σ a s."""
    random = np.random.default_rng(5)
    draw = lambda sample: {
        name: sample(size=(1, *FOUR.shape, *np.shape(x))) for name, x in problem.START.items()
    }
    scales = draw(functools.partial(random.uniform, 0.5, 2.0))
    targets = draw(random.normal)
    weight, scale, target = FOUR.weight.reshape(-1, 1), *map(problem.vectors, (scales, targets))
    optimum = (weight * scale * target).sum(axis=0) / (weight * scale).sum(axis=0)
    return {"scale": scales, **targets}, optimum


@pytest.mark.parametrize("spec", ["top_k:8", pytest.param("sign", marks=pytest.mark.slow)])
def test_feedback_and_reset_reach_the_optimum_where_the_same_compressor_alone_stalls(spec, bowls):
    """At the optimum Σ a_i g_i = 0, but Σ a_i C(g_i) is not.

    Feedback and reset leave residuals of the order of the learning rate: η falls from step 100 to
    step 400 by a factor of 3.5, and their distance with it; without them the distance stays.
    """
    batch, optimum = bowls
    two = jax.tree.map(lambda leaf: np.repeat(leaf, 2, axis=0), batch)
    grad_fn, optimizer = jaxlocal.gradients(bowl), optax.sgd(lambda t: 0.5 / (1 + t / 20))
    with pytest.warns(UserWarning, match="biased"):
        without = jaxlocal.data_parallel(grad_fn, optimizer, compressor=parse(spec))

    def distances(method, length):
        round_fn = RoundFn(method, FOUR, make_mesh(FOUR, shape=(1, 1)), max_chunk=1)
        state = round_fn.init(problem.START, jax.random.key(0))
        for done in range(length, 401, length):
            state, _ = round_fn(state, problem.steps_of(two, 0, length))
            if done in (100, 400):
                mean = problem.vectors(round_fn.mean(state)[0])[0]
                yield np.linalg.norm(mean - optimum)

    before, stalled = distances(without, 2)
    assert stalled > 0.5 and abs(stalled - before) < 0.02 * before
    for method, length in [
        (jaxlocal.ef_sgd(grad_fn, optimizer, compressor=parse(spec)), 1),
        (cser(optimizer, spec, spec, period=2, grad_fn=grad_fn), 2),
    ]:
        before, after = distances(method, length)
        assert after < 0.6 * before and after < 0.1 * stalled


@pytest.mark.slow
def test_cser_on_any_number_of_devices_is_the_same_and_its_anchor_is_one():
    layout = Layout(2, 4, weights=[1, 2, 3, 4, 4, 3, 2, 1])
    method = cser(OPTIMIZERS["momentum"], "top_k:4", "grbs:3", period=4)
    one = problem.final_state(method, layout, steps=STEPS)
    for mesh in [(1, 2), (2, 2), (2, 4)]:
        state = problem.final_state(method, layout, mesh, STEPS)
        for part in ("params", "anchor"):
            expected, got = (problem.vectors(getattr(s, part)) for s in (one, state))
            np.testing.assert_allclose(got, expected, **ROUNDING)
        for leaf in jax.tree.leaves(state.anchor):
            first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
            assert len(others) == mesh[0] * mesh[1] - 1
            for other in others:
                np.testing.assert_array_equal(other, first)
