"""Compressed methods that must coincide with others do."""

import functools

import compressed_problem as problem
import jax
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, periods
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


def run(method):
    return problem.vectors(problem.final_state(method, FOUR, steps=STEPS).params)


def cser(optimizer, gradient, reset, **options):
    compressors = {"gradient_compressor": gradient, "reset_compressor": reset}
    return jaxlocal.cser(problem.grad_fn, optimizer, **compressors, **options)


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
    method = cser(optimizer, zero(), identity(), period=period)
    np.testing.assert_allclose(run(method), local, **ROUNDING)


def test_the_second_implementation_that_sends_nothing_at_steps_is_local_sgd():
    """Up to rounding: Local SGD averages the workers of a device first."""
    local = run(jaxlocal.local_sgd(problem.grad_fn, ADAMW, period=QSR))
    method = cser(ADAMW, zero(), identity(), period=QSR, implementation=2)
    np.testing.assert_allclose(run(method), local, **ROUNDING)


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["sgd", "nesterov"])
def test_cser_that_sends_updates_whole_is_data_parallel_and_has_nothing_to_reset(name):
    """With optimizers that are linear in the gradient. The anchor is every worker's model to the
    bit."""
    optimizer = OPTIMIZERS[name]
    parallel = run(jaxlocal.data_parallel(problem.grad_fn, optimizer))
    state = problem.final_state(
        cser(optimizer, identity(), parse("top_k:4"), period=4), FOUR, steps=STEPS
    )
    models = problem.vectors(state.params)
    np.testing.assert_allclose(models, parallel, **ROUNDING)
    np.testing.assert_array_equal(models, np.repeat(problem.vectors(state.anchor), 4, axis=0))


SPECIAL_CASES = {
    "csea": (
        lambda c: jaxlocal.csea(problem.grad_fn, MOMENTUM, reset_compressor=c),
        lambda c: cser(MOMENTUM, zero(), c, period=1),
    ),
    "cser_pl": (
        lambda c: jaxlocal.cser_pl(problem.grad_fn, ADAMW, reset_compressor=c, period=QSR),
        lambda c: cser(ADAMW, zero(), c, period=QSR),
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
        run(jaxlocal.sparse_loco(problem.grad_fn, SGD))  # the largest tensor has 30
    make = functools.partial(
        jaxlocal.sparse_loco, problem.grad_fn, SGD, compressor=parse("grbs:3"), period=3
    )
    explicit = make(outer_optimizer=optax.sgd(1.0), error_decay=0.95)
    np.testing.assert_array_equal(run(make()), run(explicit))
