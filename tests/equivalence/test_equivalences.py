"""Methods that must coincide do: K = 1 is optax, one hub is Local SGD, 8 devices equal one."""

import functools

import jax
import numpy as np
import optax
import problems
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh, periods
from jaxlocal.communication import mixing, topology
from jaxlocal.stages.compose import sequence
from jaxlocal.stages.sync import sync

# Float32 rounds at 6e-8; models of size one after tens of contracting steps differ by a few of it.
ROUNDING = {"rtol": 2e-6, "atol": 2e-6}
SGD, MOMENTUM = optax.sgd(0.1), optax.sgd(0.05, momentum=0.9)
ADAMW = optax.adamw(0.05, weight_decay=0.1)
EIGHT = Layout(2, 4, weights=[1, 2, 3, 4, 4, 3, 2, 1])
OPTIMIZERS = {
    "sgd": SGD,
    "adam": optax.adam(0.05),
    "adamw": ADAMW,
    "lamb": optax.lamb(0.05, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.3, momentum=0.5)),
}


def run(method, layout, steps, mesh=(1, 1), batches=None):
    """The models after rounds of the method's period; all local steps are one program."""
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=mesh), max_chunk=1)
    batches = problems.make_batches(layout, steps) if batches is None else batches
    state, start = round_fn.init(problems.START, jax.random.key(0)), 0
    for length in periods.lengths(method.period, steps):
        part = problems.steps_of(batches, start, start + length)
        state, _ = round_fn(state, part, length=length)
        start += length
    return problems.vectors(state.params)


@functools.cache
def optax_step(optimizer):
    @jax.jit
    def update(params, opt_state, batch):
        grads = jax.grad(problems.loss)(params, batch, None)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return update


def plain_optax(optimizer, batches, worker):
    """One worker's model, by the usual loop with optax; batches [steps, 1, K, ...]."""
    update, params = optax_step(optimizer), jax.tree.map(np.float32, problems.START)
    opt_state = optimizer.init(params)
    for step in range(len(batches["inputs"])):
        batch = jax.tree.map(lambda leaf, t=step: np.float32(leaf[t, 0, worker]), batches)
        params, opt_state = update(params, opt_state, batch)
    return problems.vectors(params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_worker_is_plain_optax(name):
    batches = problems.make_batches(Layout(), 8)
    local = run(jaxlocal.local_sgd(problems.grad_fn, OPTIMIZERS[name], period=4), Layout(), 8)
    expected = plain_optax(OPTIMIZERS[name], batches, 0)
    np.testing.assert_allclose(local, expected, **ROUNDING)


@pytest.mark.parametrize(
    ("name", "worker_map"), [("lamb", "vmap"), ("clipped", "vmap"), ("clipped", "map")]
)
def test_norms_are_those_of_one_worker(name, worker_map):
    layout, optimizer = Layout(workers_per_hub=3), OPTIMIZERS[name]
    batches = problems.make_batches(layout, 4)
    batches["targets"] *= np.array([1.0, 10.0, 100.0])[:, None]  # gradients of different norms
    method = jaxlocal.local_sgd(problems.grad_fn, optimizer, period=4, worker_map=worker_map)
    round_fn = problems.on_one_device(method, layout, max_chunk=1)
    state = round_fn.init(problems.START, jax.random.key(0))
    state, _ = round_fn.local_steps(state, batches)
    expected = [plain_optax(optimizer, batches, worker)[0] for worker in range(3)]
    np.testing.assert_allclose(problems.vectors(state.params), expected, **ROUNDING)


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM], ids=["sgd", "momentum"])
def test_a_local_step_and_an_average_are_data_parallel_and_the_large_batch(optimizer):
    layout = Layout(workers_per_hub=4)
    batches = problems.make_batches(layout, 12)
    # [steps, 1, 4 workers, batch, ...] read as [steps, 1, 1 worker, 4 · batch, ...]
    large = jax.tree.map(lambda b: b.reshape(12, 1, 1, -1, *b.shape[4:]), batches)
    local = run(jaxlocal.local_sgd(problems.grad_fn, optimizer, period=1), layout, 12)
    parallel = jaxlocal.data_parallel(problems.grad_fn, optimizer)
    one = run(parallel, Layout(), 12, batches=large)
    np.testing.assert_allclose(local, run(parallel, layout, 12), **ROUNDING)
    np.testing.assert_allclose(local, np.repeat(one, 4, axis=0), **ROUNDING)


def on_graph(graph, layout):
    adjacency = graph if isinstance(graph, np.ndarray) else topology.hub_graph(graph, layout.hubs)
    return topology.mixing_matrix(adjacency, layout.hub_weight)


def mll(graph, layout, tau, q, optimizer=SGD, grad_fn=problems.grad_fn):
    matrix = on_graph(graph, layout)
    return jaxlocal.mll_sgd(grad_fn, optimizer, matrix=matrix, local_steps=tau, hub_period=q)


def test_one_hub_is_local_sgd():
    layout = Layout(1, 4, weights=[1, 2, 3, 4])
    local = run(jaxlocal.local_sgd(problems.grad_fn, MOMENTUM, period=3), layout, 12)
    one_hub = run(mll("complete", layout, 3, 2, MOMENTUM), layout, 12)
    np.testing.assert_allclose(one_hub, local, **ROUNDING)


@pytest.mark.optimized
def test_hubs_that_all_mix_at_every_average_are_local_sgd_and_hierarchical_local_sgd():
    local = run(jaxlocal.local_sgd(problems.grad_fn, MOMENTUM, period=3), EIGHT, 12)
    complete = run(mll("complete", EIGHT, 3, 1, MOMENTUM), EIGHT, 12)
    np.testing.assert_allclose(complete, local, **ROUNDING)
    hierarchical = jaxlocal.hl_sgd(
        problems.grad_fn, MOMENTUM, layout=EIGHT, local_steps=3, hub_period=1
    )
    np.testing.assert_array_equal(run(hierarchical, EIGHT, 12), complete)


def test_hubs_of_one_worker_are_cooperative_sgd():
    layout = Layout(hubs=6, weights=np.arange(1.0, 7)[:, None])
    adjacency = problems.connected_graph(6, seed=3)
    matrix = topology.mixing_matrix(adjacency, layout.hub_weight)
    cooperative = jaxlocal.cooperative_sgd(problems.grad_fn, MOMENTUM, matrix=matrix, period=3)
    expected = run(cooperative, layout, 12)
    assert np.abs(expected - expected[0]).max() > 0.1  # not merely an average of all
    multi_level = mll(adjacency, layout, 3, 1, MOMENTUM)
    np.testing.assert_allclose(run(multi_level, layout, 12), expected, **ROUNDING)


def test_any_matrix_of_workers_does_what_hub_averages_and_hub_mixing_do():
    layout = Layout(3, 2, weights=[1, 2, 3, 4, 5, 6])
    expected = run(mll("path", layout, 2, 1), layout, 8)
    hubs = topology.mixing_matrix(topology.hub_graph("path", 3), layout.hub_weight)
    share = layout.context().hub_share.reshape(-1)
    hub_of_worker = np.repeat(np.arange(3), 2)
    matrix = hubs[np.ix_(hub_of_worker, hub_of_worker)] * share[:, None]
    local = jaxlocal.local_sgd(problems.grad_fn, SGD, period=2)
    any_matrix = local._replace(outer=sync(mixing.from_matrix(matrix)))
    np.testing.assert_allclose(run(any_matrix, layout, 8), expected, **ROUNDING)
    two_stages = local._replace(
        outer=sequence(sync(mixing.hub_mean()), sync(mixing.hub_diffusion(hubs)))
    )
    np.testing.assert_allclose(run(two_stages, layout, 8), expected, **ROUNDING)


def test_qsr_without_a_coefficient_is_a_constant_period():
    schedule = optax.cosine_decay_schedule(0.1, 40)
    for base in (1, 3, 8):
        rule = periods.qsr(schedule, coefficient=0.0, base=base, warmup_steps=4)
        expected = list(periods.lengths(periods.constant(base), 40))
        assert list(periods.lengths(rule, 40)) == expected


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("make", "mesh"),
    [
        (lambda: jaxlocal.local_sgd(problems.grad_fn, ADAMW, period=16, worker_map="vmap"), (1, 1)),
        (lambda: jaxlocal.local_sgd(problems.grad_fn, ADAMW, period=16, worker_map="map"), (2, 4)),
        (lambda: mll("complete", EIGHT, 1, 16, MOMENTUM), (1, 1)),
        (lambda: mll("complete", EIGHT, 1, 16, MOMENTUM), (2, 4)),
    ],
    ids=["vmap", "map", "mll", "mll on a mesh"],
)
def test_regrouped_steps_are_equal_to_the_bit(make, mesh):
    layout = Layout(2, 4, EIGHT.weights, rates=[1, 0.5, 0.5, 0.9])
    round_fn = RoundFn(make(), layout, make_mesh(layout, shape=mesh))
    batches = problems.make_batches(layout, 16)

    def models(*sizes):
        state, start = round_fn.init(problems.START, jax.random.key(0)), 0
        for size in sizes:
            state, _ = round_fn.local_steps(state, problems.steps_of(batches, start, start + size))
            start += size
        return jax.tree.map(np.asarray, (state.params, state.opt_state))

    # Sixteen steps are one dispatch, eight are two, five are two and one is one.
    whole = models(16)
    for sizes in [(8, 8), (4, 8, 2, 1, 1), (5, 11), (1,) * 16]:
        jax.tree.map(np.testing.assert_array_equal, models(*sizes), whole)
    assert [len(list(round_fn.chunks(steps))) for steps in (16, 8, 5, 1)] == [1, 2, 2, 1]


def noisy_loss(params, batch, key):
    """Depends on the worker's random numbers too, which no mesh may change."""
    noise = 0.1 * jax.random.normal(key, (problems.FEATURES,))
    return problems.loss(params, batch, key) + noise @ params["weight"]


NOISY = jaxlocal.gradients(noisy_loss)
LINE = Layout(8, 1, EIGHT.weights)
GRID = Layout(4, 2, EIGHT.weights, rates=[0.5, 0.9])


@pytest.mark.parametrize(
    ("make", "layout", "mesh"),
    [
        (
            lambda: jaxlocal.local_sgd(NOISY, MOMENTUM, period=2, optimizer_state="average"),
            EIGHT,
            (2, 4),
        ),
        (lambda: jaxlocal.data_parallel(NOISY, MOMENTUM), GRID, (4, 2)),
        (
            lambda: jaxlocal.cooperative_sgd(NOISY, SGD, matrix=on_graph("ring", LINE), period=2),
            LINE,
            (8, 1),
        ),
        (lambda: mll("ring", GRID, 2, 1, grad_fn=NOISY), GRID, (4, 2)),
        (lambda: mll("star", GRID, 2, 1, grad_fn=NOISY), GRID, (4, 2)),
        (lambda: mll("complete", GRID, 2, 1, grad_fn=NOISY), GRID, (4, 2)),
        (lambda: mll(problems.connected_graph(4, 2), GRID, 2, 1, grad_fn=NOISY), GRID, (4, 2)),
    ],
    ids=["local", "data_parallel", "cooperative", "ring", "star", "complete", "irregular"],
)
def test_eight_devices_are_as_one(make, layout, mesh):
    method = make()
    batches = problems.make_batches(layout, 50)
    one = run(method, layout, 50, batches=batches)
    np.testing.assert_allclose(run(method, layout, 50, mesh, batches), one, **ROUNDING)


def permuted_run(make, layout, batches, hubs, workers):
    """The models in the middle of the third round, with hubs and workers in another order."""
    weights = layout.weight[hubs][:, workers]
    other = Layout(*layout.shape, weights=weights)
    round_fn = problems.on_one_device(make(other, hubs), other)
    batches = jax.tree.map(lambda leaf: leaf[:, hubs][:, :, workers], batches)
    state = round_fn.init(problems.START, jax.random.key(0))
    for start in (0, 2):
        part = problems.steps_of(batches, start, start + 2)
        state, _ = round_fn(state, part, length=2)
    state, _ = round_fn.local_steps(state, problems.steps_of(batches, 4, 6))
    return problems.vectors(state.params).reshape(*layout.shape, -1)


@pytest.mark.parametrize(
    "make",
    [
        lambda layout, hubs, graph: jaxlocal.local_sgd(problems.grad_fn, MOMENTUM, period=2),
        lambda layout, hubs, graph: mll(graph[np.ix_(hubs, hubs)], layout, 2, 1, MOMENTUM),
    ],
    ids=["local", "mll"],
)
def test_permuting_workers_permutes_their_models(make):
    layout = Layout(4, 3, weights=np.arange(1.0, 13))
    graph = topology.hub_graph("path", 4)
    random, batches = np.random.default_rng(0), problems.make_batches(layout, 6)
    hubs, workers = random.permutation(4), random.permutation(3)
    make = functools.partial(make, graph=graph)
    models = permuted_run(make, layout, batches, np.arange(4), np.arange(3))
    permuted = permuted_run(make, layout, batches, hubs, workers)
    np.testing.assert_allclose(permuted, models[hubs][:, workers], **ROUNDING)
    assert np.abs(permuted - models).max() > 0.1


@pytest.mark.parametrize("make", [jaxlocal.local_sgd, jaxlocal.data_parallel])
def test_workers_at_once_or_in_blocks_are_as_workers_in_a_loop(make):
    layout = Layout(2, 2, weights=[1, 2, 3, 4], rates=0.7)
    modes = ("vmap", "map", "blocks:3")
    runs = (run(make(NOISY, ADAMW, worker_map=mode), layout, 12) for mode in modes)
    at_once, in_turn, in_blocks = runs
    np.testing.assert_allclose(at_once, in_turn, **ROUNDING)
    np.testing.assert_allclose(in_blocks, in_turn, **ROUNDING)


def test_only_ratios_of_weights_matter():
    models = [
        run(mll("path", layout, 2, 2), layout, 8)
        for scale in (1, 7)
        for layout in [Layout(3, 2, weights=scale * np.arange(1.0, 7))]
    ]
    np.testing.assert_allclose(*models, **ROUNDING)
