"""What the named methods refuse, and how averages treat state other than parameters."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from jaxlocal import (
    ConfigurationError,
    Layout,
    compression,
    cooperative_sgd,
    gradients,
    local_sgd,
    mll_sgd,
)
from jaxlocal.communication.topology import hub_graph, mixing_matrix
from jaxlocal.methods import METHODS


def ring(layout):
    return mixing_matrix(hub_graph("ring", layout.hubs), layout.hub_weight)


def test_cooperative_sgd_refuses_hubs_of_several_workers():
    layout = Layout(4, 2)
    method = cooperative_sgd(problems.grad_fn, optax.sgd(0.1), matrix=ring(layout), period=2)
    with pytest.raises(ConfigurationError, match="hubs of 1 worker.*hubs of 2"):
        problems.on_one_device(method, layout).init(problems.START, jax.random.key(0))


@pytest.mark.parametrize("workers", [10, 11])
@pytest.mark.parametrize("count", [7, 10_000_001])
def test_the_mean_leaves_counters_of_the_model_state_whole(workers, count):
    grad_fn = gradients(lambda p, s, b, k: (p @ b, (s, {})), stateful=True)
    layout = Layout(1, workers)
    round_fn = problems.on_one_device(local_sgd(grad_fn, optax.sgd(0.1), period=1), layout)
    counters = {"count": jnp.int32(count), "seen": jnp.array(True)}
    state = round_fn.init(jnp.ones(2), jax.random.key(0), counters)
    _, model_state = round_fn.mean(state)
    assert model_state["count"] == count and model_state["count"].dtype == jnp.int32
    assert bool(model_state["seen"]) and model_state["seen"].dtype == bool


def test_periods_may_be_numpy_integers():
    grad_fn, optimizer = problems.grad_fn, optax.sgd(0.1)
    assert local_sgd(grad_fn, optimizer, period=np.int64(3)).period.length(0, 10) == 3
    layout = Layout(4, 2)
    method = mll_sgd(grad_fn, optimizer, matrix=ring(layout), local_steps=2, hub_period=np.int64(3))
    assert method.period.length(0, 60) == 6


def test_the_consensus_distance_of_half_precision_is_measured_in_float32():
    values = jnp.array([1.0, 1.0078125], jnp.bfloat16)  # neighbours, whose mean is not a bfloat16
    round_fn = problems.on_one_device(
        local_sgd(problems.grad_fn, optax.sgd(0.1), period=1), Layout(1, 2)
    )
    state = round_fn.init(jnp.bfloat16(1.0), jax.random.key(0))
    state = state._replace(params=values.reshape(1, 2))
    assert float(round_fn.consensus_distance(state)) == 0.00390625


ALL_NEEDED = {
    "hub_period": 4,
    "layout": Layout(2, 2),
    "learning_rate": 0.1,
    "local_steps": 2,
    "matrix": np.full((2, 2), 0.5),
    "period": 8,
    "switch_step": 2,
}
COMPRESSED = [
    (name, argument)
    for name, spec in METHODS.items()
    for argument in inspect.signature(spec.build).parameters
    if "compressor" in argument
]


def build(name: str, **given):
    """The method, with what it needs besides the given arguments."""
    parameters = inspect.signature(METHODS[name].build).parameters
    needed = {n for n, p in parameters.items() if p.default is p.empty} - {"grad_fn", "optimizer"}
    needed |= {"learning_rate"} & set(parameters)
    needed = {n: ALL_NEEDED.get(n, "grbs:2") for n in needed}
    return METHODS[name].build(problems.grad_fn, optax.sgd(0.1), **(needed | given))


@pytest.mark.parametrize(("name", "argument"), COMPRESSED)
@pytest.mark.filterwarnings("ignore:.* is biased")
def test_a_spec_string_is_taken_wherever_a_compressor_is(name, argument):
    for spec in ("grbs:64", "sign", compression.grbs(64)):
        build(name, **{argument: spec})
    for wrong in ("", "grbz:64", 64, b"grbs:64", compression.grbs, False):
        with pytest.raises(ConfigurationError):
            build(name, **{argument: wrong})


@pytest.mark.parametrize(
    "name", [name for name, spec in METHODS.items() if spec.takes("outer_optimizer")]
)
@pytest.mark.parametrize("wrong", [False, "sgd", optax.sgd])
def test_what_is_no_outer_optimizer_is_refused(name, wrong):
    with pytest.raises(ConfigurationError, match="the outer optimizer must be one of optax, got"):
        build(name, outer_optimizer=wrong)
