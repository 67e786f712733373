"""Compressed methods that must coincide with others do, and nothing is lost for good."""

import functools

import compressed_problem as problem
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh, periods
from jaxlocal.communication import topology
from jaxlocal.compression import identity, parse, zero

STEPS = 12
# Float64 rounds at 1e-16; models of size one after tens of contracting steps differ by a few of it.
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}
FOUR = Layout(2, 2, [1.0, 3.0, 2.0, 1.5])
OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.02, momentum=0.8),
    "nesterov": optax.sgd(0.02, momentum=0.8, nesterov=True),
    "adamw": optax.adamw(0.02, weight_decay=0.1),
}
SGD, MOMENTUM, ADAMW = (OPTIMIZERS[name] for name in ("sgd", "momentum", "adamw"))
SCHEDULE = optax.cosine_decay_schedule(0.05, STEPS)
QSR = periods.qsr(SCHEDULE, coefficient=0.1, base=2)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def final_state(method, layout=FOUR, mesh=(1, 1), batches=None, steps=STEPS):
    """The state after rounds of the method's period; all local steps are one program."""
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=mesh), max_chunk=1)
    batches = problem.make_batches(layout, steps) if batches is None else batches
    state, start = round_fn.init(problem.START, jax.random.key(0)), 0
    for length in periods.lengths(method.period, steps):
        state, _ = round_fn(state, problem.steps_of(batches, start, start + length))
        start += length
    return state


def run(method, *arguments, **options):
    return problem.vectors(final_state(method, *arguments, **options).params)


def mll(make, **options):
    matrix = topology.mixing_matrix(topology.hub_graph("ring", 2), FOUR.hub_weight)
    shape = {"mll_sgd": {"matrix": matrix}, "hl_sgd": {"layout": FOUR}}[make]
    options |= shape | {"local_steps": 2, "hub_period": 2}
    return getattr(jaxlocal, make)(problem.grad_fn, MOMENTUM, **options)


@pytest.mark.parametrize(
    ("compressed", "plain"),
    [
        (
            lambda: jaxlocal.ef_sgd(problem.grad_fn, ADAMW, compressor=identity()),
            lambda: jaxlocal.local_sgd(problem.grad_fn, ADAMW, period=1),
        ),
        (
            lambda: jaxlocal.qsparse_local_sgd(
                problem.grad_fn,
                MOMENTUM,
                compressor=identity(),
                period=4,
                optimizer_state="average",
            ),
            lambda: jaxlocal.local_sgd(
                problem.grad_fn, MOMENTUM, period=4, optimizer_state="average"
            ),
        ),
        (
            lambda: jaxlocal.sparse_loco(
                problem.grad_fn,
                ADAMW,
                compressor=identity(),
                period=4,
                outer_optimizer=optax.sgd(0.7, 0.9, True),
                error_decay=0.5,
                optimizer_state="reset",
            ),
            lambda: jaxlocal.diloco(
                problem.grad_fn,
                ADAMW,
                period=4,
                outer_optimizer=optax.sgd(0.7, 0.9, True),
                optimizer_state="reset",
            ),
        ),
        (lambda: mll("mll_sgd", compressor=identity()), lambda: mll("mll_sgd")),
        (
            lambda: mll("hl_sgd", compressor=identity(), optimizer_state="average"),
            lambda: mll("hl_sgd", optimizer_state="average"),
        ),
    ],
    ids=["ef_sgd", "qsparse_local_sgd", "sparse_loco", "mll_sgd", "hl_sgd"],
)
def test_the_identity_compressor_is_no_compressor(compressed, plain):
    """Up to rounding, since y + Σ a_i (x_i − y) takes the place of Σ a_i x_i."""
    np.testing.assert_allclose(run(compressed()), run(plain()), **ROUNDING)


@pytest.mark.optimized
def test_gradients_sent_whole_are_data_parallel_to_the_bit():
    """The same values are averaged in the same way, and added to zero."""
    make = functools.partial(jaxlocal.data_parallel, problem.grad_fn, ADAMW)
    np.testing.assert_array_equal(run(make(compressor=identity())), run(make()))


@pytest.mark.parametrize(
    ("optimizer", "period"), [(optax.sgd(SCHEDULE), QSR), (ADAMW, 5), (MOMENTUM, QSR)]
)
def test_cser_that_sends_nothing_at_steps_and_resets_everything_is_local_sgd(optimizer, period):
    assert len(set(periods.lengths(QSR, STEPS))) > 1  # the rule is at work
    local = run(jaxlocal.local_sgd(problem.grad_fn, optimizer, period=period))
    cser = jaxlocal.cser(
        problem.grad_fn,
        optimizer,
        gradient_compressor=zero(),
        reset_compressor=identity(),
        period=period,
    )
    np.testing.assert_allclose(run(cser), local, **ROUNDING)


@pytest.mark.optimized
def test_the_second_implementation_that_sends_nothing_at_steps_is_local_sgd_to_the_bit():
    local = run(jaxlocal.local_sgd(problem.grad_fn, ADAMW, period=QSR))
    cser = jaxlocal.cser(
        problem.grad_fn,
        ADAMW,
        gradient_compressor=zero(),
        reset_compressor=identity(),
        period=QSR,
        implementation=2,
    )
    np.testing.assert_array_equal(run(cser), local)


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["sgd", "nesterov"])
def test_cser_that_sends_updates_whole_is_data_parallel_and_has_nothing_to_reset(name):
    """With optimizers that are linear in the gradient. The anchor is every worker's model to the
    bit."""
    optimizer = OPTIMIZERS[name]
    parallel = run(jaxlocal.data_parallel(problem.grad_fn, optimizer))
    cser = jaxlocal.cser(
        problem.grad_fn,
        optimizer,
        gradient_compressor=identity(),
        reset_compressor=parse("top_k:4"),
        period=4,
    )
    state = final_state(cser)
    models = problem.vectors(state.params)
    np.testing.assert_allclose(models, parallel, **ROUNDING)
    np.testing.assert_array_equal(models, np.repeat(problem.vectors(state.anchor), 4, axis=0))


SPECIAL_CASES = {
    "csea": (
        lambda c: jaxlocal.csea(problem.grad_fn, MOMENTUM, reset_compressor=c),
        lambda c: jaxlocal.cser(
            problem.grad_fn, MOMENTUM, gradient_compressor=zero(), reset_compressor=c, period=1
        ),
    ),
    "cser_pl": (
        lambda c: jaxlocal.cser_pl(problem.grad_fn, ADAMW, reset_compressor=c, period=QSR),
        lambda c: jaxlocal.cser(
            problem.grad_fn, ADAMW, gradient_compressor=zero(), reset_compressor=c, period=QSR
        ),
    ),
    "ef_sgd": (
        lambda c: jaxlocal.ef_sgd(problem.grad_fn, MOMENTUM, compressor=c),
        lambda c: jaxlocal.qsparse_local_sgd(problem.grad_fn, MOMENTUM, compressor=c, period=1),
    ),
    "sparse_loco": (
        lambda c: jaxlocal.sparse_loco(
            problem.grad_fn,
            ADAMW,
            compressor=c,
            period=QSR,
            outer_optimizer=optax.sgd(1.0),
            error_decay=1.0,
        ),
        lambda c: jaxlocal.qsparse_local_sgd(problem.grad_fn, ADAMW, compressor=c, period=QSR),
    ),
}


@pytest.mark.parametrize(
    ("name", "spec"),
    list(zip(SPECIAL_CASES, ["random_k:3", "top_k:4", "grbs:3", "grbs:3"], strict=True)),
)
def test_special_cases(name, spec):
    one, other = (run(make(parse(spec))) for make in SPECIAL_CASES[name])
    np.testing.assert_allclose(one, other, **ROUNDING)


def test_the_defaults_of_sparse_loco_are_the_papers():
    with pytest.raises(jaxlocal.ConfigurationError, match="top_k:64 keeps one value in 64"):
        final_state(jaxlocal.sparse_loco(problem.grad_fn, SGD))  # the largest tensor has 30
    make = functools.partial(
        jaxlocal.sparse_loco, problem.grad_fn, SGD, compressor=parse("grbs:3"), period=3
    )
    explicit = make(outer_optimizer=optax.sgd(1.0), error_decay=0.95)
    np.testing.assert_array_equal(run(make()), run(explicit))


def plain_optax(optimizer, batches):
    """The loop that everyone writes, on the first worker's batches."""
    params = jax.tree.map(jnp.asarray, problem.START)
    opt_state = optimizer.init(params)
    for step in range(STEPS):
        batch = jax.tree.map(lambda leaf, t=step: leaf[t, 0, 0], batches)
        grads = jax.grad(problem.loss)(params, batch, None)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
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
    layout, optimizer = Layout(), OPTIMIZERS[name]
    cser = jaxlocal.cser(
        problem.grad_fn,
        optimizer,
        gradient_compressor=parse(update),
        reset_compressor=parse(reset),
        period=3,
    )
    batches = problem.make_batches(layout, STEPS)
    expected = plain_optax(optimizer, batches)
    np.testing.assert_allclose(run(cser, layout, batches=batches), expected, **ROUNDING)


def pull(params, batch, key):
    """A loss whose gradient is the batch, wherever the model is."""
    return sum(jnp.vdot(batch[name], params[name]) for name in params)


@pytest.mark.parametrize(("update", "reset"), [("top_k:4+int8", "sign"), ("powersgd:1", "grbs:3")])
def test_the_mean_of_the_models_moves_by_the_mean_update_with_any_compressor(update, reset):
    """Σ a_i x_i = x_0 − η Σ_t Σ_i a_i g_i(t) over the steps that worker i did not skip, and the
    anchor is that without the mean error."""
    layout = Layout(2, 2, FOUR.weights, rates=[0.4, 0.7])
    grad_fn = jaxlocal.gradients(pull)
    method = jaxlocal.cser(
        grad_fn,
        optax.sgd(0.1),
        gradient_compressor=parse(update),
        reset_compressor=parse(reset),
        period=3,
    )
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


@pytest.mark.parametrize("spec", ["top_k:8", "sign"])
def test_feedback_and_reset_reach_the_optimum_where_the_same_compressor_alone_stalls(spec, bowls):
    """At the optimum Σ a_i g_i = 0, but Σ a_i C(g_i) is not. Feedback and reset leave what workers
    have not sent yet, which is of the order of the learning rate: η falls from step 100 to step 400
    by a factor of 3.5, and their distance with it, while the other stays where it is."""
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
    compressor = parse(spec)
    for method, length in [
        (jaxlocal.ef_sgd(grad_fn, optimizer, compressor=compressor), 1),
        (
            jaxlocal.cser(
                grad_fn,
                optimizer,
                gradient_compressor=compressor,
                reset_compressor=compressor,
                period=2,
            ),
            2,
        ),
    ]:
        before, after = distances(method, length)
        assert after < 0.6 * before and after < 0.1 * stalled


@pytest.mark.optimized
def test_cser_on_any_number_of_devices_is_the_same_and_its_anchor_is_one():
    layout = Layout(2, 4, weights=[1, 2, 3, 4, 4, 3, 2, 1])
    method = jaxlocal.cser(
        problem.grad_fn,
        MOMENTUM,
        gradient_compressor=parse("top_k:4"),
        reset_compressor=parse("grbs:3"),
        period=4,
    )
    one = final_state(method, layout)
    for mesh in [(1, 2), (2, 2), (2, 4)]:
        state = final_state(method, layout, mesh)
        for part in ("params", "anchor"):
            expected, got = (problem.vectors(getattr(s, part)) for s in (one, state))
            np.testing.assert_allclose(got, expected, **ROUNDING)
        for leaf in jax.tree.leaves(state.anchor):
            first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
            assert len(others) == mesh[0] * mesh[1] - 1
            for other in others:
                np.testing.assert_array_equal(other, first)
