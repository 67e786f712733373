"""The library's compressed methods in float64 equal the papers' algorithms as plain NumPy loops.

The loops replay the library's compressors on the tree of one worker after another. The comparison
is therefore of the method: who sends what and when, how it is aggregated, which residual is kept.
"""

import warnings

import compressed_problem as problem
import jax
import numpy as np
import optax
import pytest
import reference
import reference_compressed as compressed
import reference_compressors
import reference_periods
from problems import connected_graph

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh, periods
from jaxlocal.communication import topology
from jaxlocal.compression import parse
from jaxlocal.parallel.keys import ROUND_MESSAGE, STEP_MESSAGE

STEPS = 16
# Float64 rounds at 1e-16; some hundred operations on numbers of size one leave 1e-13 or less.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
WEIGHTS = [1.0, 3.0, 2.0, 1.5]


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def decaying(step):
    return 0.1 / (1 + 0.05 * step)


def descent(*transformations):
    return optax.chain(*transformations, jaxlocal.scale_by_step(decaying))


# By name: the optimizer, and the reference's rule with the same constants.
OPTIMIZERS = {
    "sgd": (descent(), compressed.sgd()),
    "momentum": (descent(optax.trace(0.8)), compressed.sgd(0.8)),
    "nesterov": (
        descent(optax.trace(0.7, nesterov=True)),
        compressed.sgd(0.7, nesterov=True),
    ),
    "adamw": (
        descent(optax.scale_by_adam(0.8, 0.95), optax.add_decayed_weights(0.1)),
        compressed.adamw(0.8, 0.95, 0.1),
    ),
}


def four(rates=1.0, hubs=2):
    return Layout(hubs, 4 // hubs, WEIGHTS, rates)


def built(name, optimizer, **options):
    return getattr(jaxlocal, name)(problem.grad_fn, OPTIMIZERS[optimizer][0], **options)


def cser(optimizer, update, reset, **options):
    compressors = {"gradient_compressor": parse(update), "reset_compressor": parse(reset)}
    return built("cser", optimizer, **compressors, **options)


def compare(method, layout, mesh, optimizer, lengths, loops):
    """Compare a run of the library with `loops(run)`, the expected models and errors (or None).

    The loops are given which workers the library drew as active.
    """
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=mesh))
    batches = problem.make_batches(layout, STEPS)
    models, anchors, active = problem.trajectory(round_fn, batches, lengths)
    assert active.all() == (layout.rate == 1).all()
    gradient, weights = problem.numpy_gradient(batches), layout.weight.reshape(-1)
    rule = OPTIMIZERS[optimizer][1]
    run = compressed.Run(gradient, problem.START_VECTOR, decaying, weights, rule, active)
    expected, errors = loops(run)
    stage = round_fn.method.inner.steps
    np.testing.assert_allclose(models, expected[::stage], **CLOSE)
    return anchors, expected, errors


def at_steps(spec, weights=WEIGHTS):
    return problem.replay(spec, STEP_MESSAGE, weights)


def at_ends(spec, weights=WEIGHTS, hub_of_worker=None):
    return problem.replay(spec, ROUND_MESSAGE, weights, hub_of_worker)


@pytest.mark.parametrize(
    ("spec", "optimizer", "mesh", "worker_map", "rates"),
    [
        ("grbs:3", "sgd", (1, 1), "vmap", 1.0),
        ("top_k:4", "nesterov", (2, 1), "map", [0.4, 0.7]),
        ("sign", "momentum", (2, 2), "map", 0.6),
        ("random_k:3", "adamw", (1, 1), "map", 1.0),
        ("qsgd:3", "sgd", (1, 2), "vmap", [0.4, 0.7]),
        ("int8", "momentum", (1, 1), "map", 1.0),
        ("powersgd:1", "nesterov", (2, 2), "vmap", [0.4, 0.7]),
        ("top_k:4+int8", "adamw", (2, 1), "vmap", 1.0),
    ],
)
def test_ef_sgd(spec, optimizer, mesh, worker_map, rates):
    method = built("ef_sgd", optimizer, compressor=parse(spec), worker_map=worker_map)
    loops = lambda run: compressed.ef_sgd(run, STEPS, at_ends(spec))
    anchors, expected, _ = compare(method, four(rates), mesh, optimizer, [1] * STEPS, loops)
    np.testing.assert_allclose(anchors, expected[:, 0], **CLOSE)


RULES = {
    "constant": (periods.constant(5), reference_periods.constant(STEPS, 5)),
    "quadratic": (
        periods.qsr(decaying, coefficient=0.16, base=2),
        reference_periods.qsr(decaying, STEPS, 0.16, 2),
    ),
}


def lengths_of(rule):
    period, expected = RULES[rule]
    assert list(periods.lengths(period, STEPS)) == expected and len(set(expected)) > 1
    return period, expected


@pytest.mark.parametrize(
    ("spec", "optimizer", "rule", "mesh", "rates"),
    [
        ("grbs:3", "nesterov", "quadratic", (2, 2), 1.0),
        ("sign", "adamw", "quadratic", (2, 1), [0.4, 0.7]),
        ("powersgd:1", "sgd", "constant", (1, 2), 1.0),
    ],
)
def test_qsparse_local_sgd(spec, optimizer, rule, mesh, rates):
    period, lengths = lengths_of(rule)
    method = built("qsparse_local_sgd", optimizer, compressor=parse(spec), period=period)
    loops = lambda run: compressed.qsparse_local_sgd(run, lengths, at_ends(spec))
    compare(method, four(rates), mesh, optimizer, lengths, loops)


@pytest.mark.parametrize(
    ("spec", "optimizer", "momentum", "nesterov", "mesh", "rates"),
    [
        ("grbs:3", "nesterov", 0.7, True, (2, 2), 1.0),
        ("sign", "momentum", 0.8, False, (1, 1), [0.4, 0.7]),
        ("top_k:4", "adamw", 0.0, False, (1, 2), 1.0),
    ],
)
def test_decay_outside_the_compressor(spec, optimizer, momentum, nesterov, mesh, rates):
    """EF-SGD with the first of them, QSparse-local-SGD with the others."""
    trace = [optax.trace(momentum, nesterov)] if momentum else []
    decay = descent(optax.add_decayed_weights(0.3), *trace)
    if optimizer == "nesterov":
        lengths = [1] * STEPS
        method = built("ef_sgd", optimizer, compressor=spec, decay_optimizer=decay)
    else:
        period, lengths = lengths_of("quadratic")
        options = {"compressor": spec, "period": period}
        method = built("qsparse_local_sgd", optimizer, decay_optimizer=decay, **options)

    def loops(run):
        return compressed.qsparse_with_decay_outside(
            run, lengths, at_ends(spec), 0.3, momentum, nesterov
        )

    compare(method, four(rates), mesh, optimizer, lengths, loops)


@pytest.mark.parametrize(
    ("update", "reset", "rule", "mesh"),
    [
        ("grbs:3", "grbs:2", "constant", (2, 2)),
        ("top_k:4", "random_k:3", "quadratic", (1, 1)),
        ("grbs_tensors:3:2", "grbs_tensors:2:2", "constant", (1, 2)),
        ("sign", "sign", "quadratic", (2, 1)),
    ],
)
def test_cser(update, reset, rule, mesh):
    """Algorithm 2, which sends gradients: these compressors are homogeneous, and odd where no entry
    is zero, so that C(−η g) = −η C(g)."""
    period, lengths = lengths_of(rule)
    method = cser("sgd", update, reset, period=period)
    loops = lambda run: compressed.cser(run, lengths, at_steps(update), at_ends(reset))
    anchors, models, errors = compare(method, four(), mesh, "sgd", lengths, loops)
    np.testing.assert_allclose(anchors, (models - errors)[:, 0], **CLOSE)


@pytest.mark.parametrize(
    ("optimizer", "update", "reset", "rule", "mesh", "worker_map", "rates"),
    [
        ("momentum", "grbs:3", "grbs:2", "quadratic", (2, 2), "map", 1.0),
        ("nesterov", "top_k:4", "sign", "constant", (1, 1), "vmap", 1.0),
        ("adamw", "int8", "top_k:4+int8", "quadratic", (2, 1), "vmap", [0.4, 0.7]),
        ("adamw", "random_k:3", "powersgd:1", "constant", (2, 2), "map", 1.0),
        ("momentum", "powersgd:1", "qsgd:3", "constant", (1, 2), "vmap", 0.5),
    ],
)
def test_momentum_cser_in_the_first_implementation(
    optimizer, update, reset, rule, mesh, worker_map, rates
):
    period, lengths = lengths_of(rule)
    method = cser(optimizer, update, reset, period=period, worker_map=worker_map)
    loops = lambda run: compressed.m_cser_1(run, lengths, at_steps(update), at_ends(reset))
    anchors, models, errors = compare(method, four(rates), mesh, optimizer, lengths, loops)
    np.testing.assert_allclose(anchors, (models - errors)[:, 0], **CLOSE)


@pytest.mark.parametrize(
    ("optimizer", "update", "reset", "mesh", "rates"),
    [
        ("nesterov", "grbs:3", "grbs:2", (2, 2), 1.0),
        ("adamw", "random_k:3", "random_k:3", (1, 1), [0.4, 0.7]),
    ],
)
def test_momentum_cser_in_the_second_implementation(optimizer, update, reset, mesh, rates):
    period, lengths = lengths_of("quadratic")
    method = cser(optimizer, update, reset, period=period, implementation=2)

    def loops(run):
        return compressed.m_cser_2(run, lengths, at_steps(update), at_ends(reset)), None

    compare(method, four(rates), mesh, optimizer, lengths, loops)


@pytest.mark.parametrize(
    ("optimizer", "update", "reset", "mesh", "rates"),
    [
        ("nesterov", "grbs:3", "grbs:2", (2, 2), 1.0),
        ("adamw", "random_k:3", "random_k:3", (1, 1), [0.4, 0.7]),
    ],
)
def test_momentum_cser_as_released(optimizer, update, reset, mesh, rates):
    period, lengths = lengths_of("quadratic")
    method = cser(optimizer, update, reset, period=period, implementation="released")

    def loops(run):
        return compressed.m_cser_released(run, lengths, at_steps(update), at_ends(reset)), None

    compare(method, four(rates), mesh, optimizer, lengths, loops)


@pytest.mark.parametrize(
    ("optimizer", "spec", "lengths", "mesh"),
    [
        ("momentum", "grbs:3", None, (2, 1)),
        ("adamw", "top_k:4", None, (1, 1)),
        ("nesterov", "powersgd:1", RULES["quadratic"], (1, 2)),
    ],
)
def test_csea_and_cser_pl(optimizer, spec, lengths, mesh):
    """CSER that sends nothing at steps; it resets at every step, or at the end of a round."""
    if lengths is None:
        method, lengths = built("csea", optimizer, reset_compressor=parse(spec)), [1] * STEPS
    else:
        period, lengths = lengths
        method = built("cser_pl", optimizer, reset_compressor=parse(spec), period=period)
    loops = lambda run: compressed.m_cser_1(run, lengths, reference_compressors.zero, at_ends(spec))
    anchors, models, errors = compare(method, four(), mesh, optimizer, lengths, loops)
    np.testing.assert_allclose(anchors, (models - errors)[:, 0], **CLOSE)


@pytest.mark.parametrize(
    ("spec", "decay", "outer", "optimizer", "mesh", "rates"),
    [
        ("top_k:4", 0.95, (1.0, 0.0, False), "adamw", (2, 2), 1.0),
        ("top_k:4+int8", 0.8, (0.7, 0.9, True), "momentum", (1, 1), [0.4, 0.7]),
        ("grbs:3", 0.5, (0.8, 0.6, False), "sgd", (1, 2), 1.0),
    ],
)
def test_sparse_loco(spec, decay, outer, optimizer, mesh, rates):
    period, lengths = lengths_of("quadratic")
    rate, momentum, nesterov = outer
    options = {"outer_optimizer": optax.sgd(rate, momentum or None, nesterov), "period": period}
    method = built("sparse_loco", optimizer, compressor=parse(spec), error_decay=decay, **options)
    loops = lambda run: compressed.sparse_loco(run, lengths, at_ends(spec), decay, *outer)
    compare(method, four(rates), mesh, optimizer, lengths, loops)


@pytest.mark.parametrize(
    ("spec", "optimizer", "mesh", "rates"),
    [
        ("grbs:3", "nesterov", (2, 2), 1.0),
        ("qsgd:3", "adamw", (1, 1), [0.4, 0.7]),
        ("powersgd:1", "momentum", (2, 1), 0.5),
    ],
)
def test_data_parallel(spec, optimizer, mesh, rates):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # top_k and powersgd are biased
        method = built("data_parallel", optimizer, compressor=parse(spec))

    def loops(run):
        one = compressed.data_parallel(run, STEPS, at_steps(spec))
        return np.repeat(one[:, None], 4, axis=1), None

    compare(method, four(rates), mesh, optimizer, [STEPS], loops)


@pytest.mark.parametrize(
    ("spec", "graph", "hubs", "workers", "optimizer", "mesh"),
    [
        ("grbs:3", "ring", 4, 2, "sgd", (4, 2)),
        ("top_k:4", 1, 5, 2, "momentum", (5, 1)),
        ("powersgd:1", "ring", 3, 2, "sgd", (1, 1)),
    ],
)
def test_multi_level_local_sgd(spec, graph, hubs, workers, optimizer, mesh):
    tau, q = 2, 2
    random, count = np.random.default_rng(hubs), hubs * workers
    weights = random.uniform(0.5, 4, count)
    layout = Layout(hubs, workers, weights, np.linspace(0.3, 1, count))
    if isinstance(graph, int):
        adjacency = connected_graph(hubs, graph)
    else:
        adjacency = topology.hub_graph(graph, hubs)
    matrix = topology.mixing_matrix(adjacency, layout.hub_weight)
    options = {"matrix": matrix, "local_steps": tau, "hub_period": q}
    method = built("mll_sgd", optimizer, compressor=parse(spec), **options)
    hub_of_worker = np.repeat(np.arange(hubs), workers)
    mixing = reference.mixing_matrix(adjacency, layout.hub_weight)

    def loops(run):
        compress = at_ends(spec, weights, hub_of_worker)
        return compressed.mll_sgd(run, STEPS, tau, q, hub_of_worker, mixing, compress)

    lengths = [tau * q] * (STEPS // (tau * q))
    compare(method, layout, mesh, optimizer, lengths, loops)
