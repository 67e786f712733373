"""The library in float64 equals the papers' algorithms as plain NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import reference
import reference_periods
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh, periods
from jaxlocal.communication import topology

STEPS, WARMUP = 24, 5
# Float64 rounds at 1e-16; some hundred operations on numbers of size one leave 1e-13 or less.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
START = np.append(problems.START["weight"], problems.START["bias"])


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def decaying(step):
    return 0.1 / (1 + 0.05 * step)


def grid(hubs, workers, seed):
    """Unequal weights, and rates from rare to always."""
    random = np.random.default_rng(seed)
    count = hubs * workers
    return Layout(hubs, workers, random.uniform(0.5, 4, count), np.linspace(0.2, 1, count))


def adjacency_of(graph, hubs):
    if graph == "ten hubs of the paper":
        return problems.TEN_HUBS
    if isinstance(graph, int):
        return problems.connected_graph(hubs, graph)
    return topology.hub_graph(graph, hubs)


def mll_reference(layout, adjacency, batches, tau, q, active):
    """The models after every τ steps."""
    hub_of_worker = np.repeat(np.arange(layout.hubs), layout.workers_per_hub)
    weights = layout.weight.reshape(-1)
    mixing = reference.mixing_matrix(adjacency, np.bincount(hub_of_worker, weights))
    arguments = (decaying, len(active), tau, q, weights, hub_of_worker, mixing, active)
    return reference.mll_sgd(problems.numpy_gradient(batches), START, *arguments)[::tau]


@pytest.mark.parametrize(
    ("graph", "hubs", "workers", "tau", "qs", "mesh", "worker_map"),
    [
        ("ten hubs of the paper", 10, 2, 3, (2, 4), (1, 1), "vmap"),
        ("ten hubs of the paper", 10, 2, 2, (3,), (5, 1), "map"),
        ("ring", 4, 2, 2, (1, 2), (4, 2), "map"),
        ("ring", 6, 1, 1, (4,), (3, 1), "vmap"),
        ("star", 4, 3, 4, (3,), (2, 1), "vmap"),
        ("complete", 2, 4, 3, (2,), (2, 4), "map"),
        ("path", 3, 2, 2, (4,), (3, 2), "vmap"),
        (1, 3, 2, 1, (1, 6), (1, 1), "map"),
        (2, 5, 1, 3, (2,), (5, 1), "vmap"),
        (3, 4, 2, 2, (6,), (2, 2), "map"),
    ],
)
def test_mll_sgd(graph, hubs, workers, tau, qs, mesh, worker_map):
    layout, adjacency = grid(hubs, workers, seed=hubs), adjacency_of(graph, hubs)
    matrix = topology.mixing_matrix(adjacency, layout.hub_weight)
    optimizer = jaxlocal.scale_by_step(decaying)
    method = jaxlocal.mll_sgd(
        problems.grad_fn,
        optimizer,
        matrix=matrix,
        local_steps=tau,
        hub_period=qs[0],
        worker_map=worker_map,
    )
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=mesh))
    for q in qs:  # q is the host's: the same two programs serve all of them
        for seed in range(2):
            batches = problems.make_batches(layout, STEPS, seed)
            lengths = [tau * q] * (STEPS // (tau * q))
            models, active = problems.trajectory(round_fn, batches, lengths, seed)
            assert 0.3 < active.mean() < 0.9 and active[:, -1].all()
            expected = mll_reference(layout, adjacency, batches, tau, q, active)
            np.testing.assert_allclose(models, expected, **CLOSE)


def test_mll_sgd_in_whole_rounds_of_which_the_last_is_shorter():
    layout, adjacency = grid(3, 2, seed=0), topology.hub_graph("path", 3)
    matrix = topology.mixing_matrix(adjacency, layout.hub_weight)
    optimizer = jaxlocal.scale_by_step(decaying)
    method = jaxlocal.mll_sgd(
        problems.grad_fn, optimizer, matrix=matrix, local_steps=2, hub_period=3
    )
    round_fn = problems.on_one_device(method, layout)
    batches = problems.make_batches(layout, 10)
    state, active = round_fn.init(problems.START, jax.random.key(1)), []
    for start, length in [(0, 6), (6, 4)]:
        part = problems.steps_of(batches, start, start + length)
        state, info = round_fn(state, part, length=length)
        active.append(np.asarray(info.worker["active"]).reshape(length, -1) > 0)
    assert list(periods.lengths(method.period, 10)) == [6, 4] and int(state.step) == 10
    # The loops mix after every sixth step only; the last mixing is added here.
    last = mll_reference(layout, adjacency, batches, 2, 3, np.concatenate(active))[-1]
    hubs = reference.mixing_matrix(adjacency, layout.hub_weight).T @ last[::2]
    expected = np.repeat(hubs, 2, axis=0)
    np.testing.assert_allclose(problems.vectors(state.params), expected, **CLOSE)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_hl_sgd(mesh):
    layout = grid(2, 2, seed=3)
    optimizer = jaxlocal.scale_by_step(decaying)
    method = jaxlocal.hl_sgd(
        problems.grad_fn, optimizer, layout=layout, local_steps=2, hub_period=3
    )
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=mesh))
    batches = problems.make_batches(layout, STEPS)
    lengths = periods.lengths(method.period, STEPS)
    models, active = problems.trajectory(round_fn, batches, lengths)
    expected = mll_reference(layout, np.ones((2, 2)), batches, 2, 3, active)
    np.testing.assert_allclose(models, expected, **CLOSE)


@pytest.mark.parametrize(("graph", "mesh"), [("ring", (8, 1)), (5, (4, 1)), ("star", (1, 1))])
def test_cooperative_sgd(graph, mesh):
    layout, adjacency = grid(8, 1, seed=4), adjacency_of(graph, 8)
    matrix = topology.mixing_matrix(adjacency, layout.hub_weight)
    optimizer = jaxlocal.scale_by_step(decaying)
    method = jaxlocal.cooperative_sgd(problems.grad_fn, optimizer, matrix=matrix, period=3)
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=mesh))
    batches = problems.make_batches(layout, STEPS)
    lengths = periods.lengths(method.period, STEPS)
    models, active = problems.trajectory(round_fn, batches, lengths)
    expected = mll_reference(layout, adjacency, batches, 3, 1, active)
    np.testing.assert_allclose(models[::3], expected, **CLOSE)


# By name: the optimizer of a learning rate, and the reference's loop with the same constants.
OPTIMIZERS = {
    "sgd": (optax.sgd, reference.local_sgd),
    "momentum": (
        functools.partial(optax.sgd, momentum=0.9),
        functools.partial(reference.local_sgd, momentum=0.9),
    ),
    "nesterov": (
        functools.partial(optax.sgd, momentum=0.8, nesterov=True),
        functools.partial(reference.local_sgd, momentum=0.8, nesterov=True),
    ),
    "adamw": (
        functools.partial(optax.adamw, b1=0.8, b2=0.95, weight_decay=0.1),
        functools.partial(reference.local_adamw, beta1=0.8, beta2=0.95, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize(
    ("optimizer", "at_sync", "decay", "shape", "mesh"),
    [
        ("sgd", "keep", "cosine_step", (1, 4), (1, 4)),
        ("momentum", "keep", "cosine", (1, 4), (1, 1)),
        ("momentum", "average", "linear", (2, 4), (2, 2)),
        ("momentum", "reset", "step", (1, 3), (1, 1)),
        ("nesterov", "keep", "step", (1, 8), (1, 8)),
        ("nesterov", "average", "constant", (1, 3), (1, 1)),
        ("nesterov", "reset", "cosine", (2, 2), (2, 1)),
        ("adamw", "keep", "cosine", (1, 3), (1, 3)),
        ("adamw", "average", "cosine_step", (1, 4), (1, 2)),
        ("adamw", "reset", "linear", (1, 3), (1, 1)),
    ],
)
def test_local_sgd(optimizer, at_sync, decay, shape, mesh):
    peak = 0.1 if optimizer != "sgd" else 0.2
    rate = reference_periods.schedule(decay, peak, STEPS, WARMUP)
    make_optimizer, reference_loop = OPTIMIZERS[optimizer]
    scheduled = problems.schedule(decay, peak, STEPS, WARMUP)
    layout = Layout(*shape, weights=np.random.default_rng(1).uniform(0.5, 4, shape))
    method = jaxlocal.local_sgd(
        problems.grad_fn, make_optimizer(scheduled), period=4, optimizer_state=at_sync
    )
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=mesh))
    batches = problems.make_batches(layout, STEPS)
    # H is the host's: the same two programs serve every rule.
    rules = {
        "constant": (periods.constant(5), reference_periods.constant(STEPS, 5)),
        "quadratic": (
            periods.qsr(scheduled, coefficient=0.2, base=2, warmup_steps=WARMUP),
            reference_periods.qsr(rate, STEPS, 0.2, 2, 2, WARMUP),
        ),
        "post-local": (periods.post_local(7, 6), reference_periods.post_local(STEPS, 7, 6)),
        "swap": (periods.swap(9), reference_periods.swap(STEPS, 9)),
    }
    for rule, (period, expected_lengths) in rules.items():
        lengths = list(periods.lengths(period, STEPS))
        assert lengths == expected_lengths, rule
        models, _ = problems.trajectory(round_fn, batches, lengths)
        gradient = problems.numpy_gradient(batches)
        weights = layout.weight.reshape(-1)
        expected = reference_loop(gradient, START, rate, lengths, weights, at_sync=at_sync)
        np.testing.assert_allclose(models, expected, **CLOSE, err_msg=rule)


@pytest.mark.parametrize(("shape", "mesh", "beta"), [((1, 4), (1, 1), 0.0), ((2, 4), (2, 4), 0.9)])
def test_data_parallel(shape, mesh, beta):
    layout = Layout(*shape, weights=np.random.default_rng(2).uniform(0.5, 4, shape))
    optimizer = optax.sgd(decaying, momentum=beta, nesterov=beta > 0)
    method = jaxlocal.data_parallel(problems.grad_fn, optimizer)
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=mesh))
    batches = problems.make_batches(layout, STEPS)
    models, _ = problems.trajectory(round_fn, batches, [STEPS])
    gradient, weights = problems.numpy_gradient(batches), layout.weight.reshape(-1)
    one = reference.data_parallel(gradient, START, decaying, STEPS, weights, beta, beta > 0)
    expected = np.broadcast_to(one[:, None], models.shape)
    np.testing.assert_allclose(models, expected, **CLOSE)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 400),
    st.integers(0, 100),
    st.floats(0, 1),
    st.integers(1, 20),
    st.sampled_from([1, 2, 3]),
)
@settings(max_examples=40, deadline=None)
def test_rules_in_the_learning_rate(seed, steps, warmup, coefficient, base, exponent):
    """For any learning rates that fall after the warm-up, tiny ones included."""
    table = 10.0 ** np.random.default_rng(seed).uniform(-7, 0, steps + warmup)
    table[warmup:] = np.sort(table[warmup:])[::-1]
    rule = {1: periods.linear, 2: periods.qsr, 3: periods.cubic}[exponent]
    learning_rate = lambda step: jnp.asarray(table)[step]
    period = rule(learning_rate, coefficient=coefficient, base=base, warmup_steps=warmup)
    arguments = (steps, coefficient, base, exponent, warmup)
    expected = reference_periods.qsr(lambda step: table[step], *arguments)
    assert list(periods.lengths(period, steps)) == expected


@given(st.integers(1, 300), st.integers(0, 400), st.integers(1, 50))
@settings(deadline=None)
def test_rules_in_the_step(steps, switch, local_steps):
    def lengths(make, **options):
        method = make(problems.grad_fn, optax.sgd(0.1), **options)
        return list(periods.lengths(method.period, steps))

    expected = reference_periods.constant(steps, local_steps)
    assert lengths(jaxlocal.local_sgd, period=local_steps) == expected
    expected = reference_periods.post_local(steps, switch, local_steps)
    options = {"switch_step": switch, "local_steps": local_steps}
    assert lengths(jaxlocal.post_local_sgd, **options) == expected
    assert lengths(jaxlocal.swap, switch_step=switch) == reference_periods.swap(steps, switch)


VIT = (300 * 312, 10_000, 0.008)
RESNET = (200 * 312, 5 * 312, 0.8)


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear", "cosine_step", "step"])
@pytest.mark.parametrize(
    ("run", "rules"),
    [
        (VIT, [(0.0175, 4, 2), (0.0175, 8, 2), (0.01, 4, 1), (0.0075, 4, 3)]),
        (RESNET, [(0.2, 2, 2), (0.25, 4, 2), (0.2, 4, 1), (0.2, 4, 3)]),
    ],
    ids=["ViT-B", "ResNet-152"],
)
def test_published_runs(run, rules, decay):
    """Every H of the runs of arXiv 2310.14423: steps, warm-up and peak, and (α, H_base, power)."""
    steps, warmup, peak = run
    rate = reference_periods.schedule(decay, peak, steps, warmup)
    scheduled = problems.schedule(decay, peak, steps, warmup)
    some = range(0, steps, 97)
    rates = periods.rates(scheduled)
    # At the floor of 1e-6 a cosine of size one has lost six of its sixteen digits.
    np.testing.assert_allclose([rates(t) for t in some], [rate(t) for t in some], rtol=1e-9)
    for coefficient, base, exponent in rules:
        period = periods.power(
            scheduled, coefficient=coefficient, base=base, exponent=exponent, warmup_steps=warmup
        )
        expected = reference_periods.qsr(rate, steps, coefficient, base, exponent, warmup)
        assert list(periods.lengths(period, steps)) == expected
