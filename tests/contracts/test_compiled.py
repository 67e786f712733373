"""Which collectives compiled rounds run, where and on how many bytes, read off optimised HLO."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn
from jaxlocal.communication import topology
from jaxlocal.communication.audit import Audited, audit
from jaxlocal.nn import conv_general_dilated, max_pool
from jaxlocal.training.pieces import Piece


def dense(params, batch, key):
    hidden = jax.nn.relu(batch.reshape(len(batch), -1) @ params["first"] + params["bias"])
    return jnp.square(hidden @ params["second"]).mean()


def convolutional(params, batch, key):
    kept = batch * jax.random.bernoulli(key, 0.5, batch.shape)
    images = conv_general_dilated(
        kept, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    pooled = max_pool(jax.nn.relu(images), (2, 2), (2, 2))
    return jnp.square(pooled.reshape(len(batch), -1) @ params["second"]).mean()


pytestmark = pytest.mark.optimized  # which is what users run

IMAGES = (2, 4, 4, 3)  # [batch, height, width, channels]
PARAMS = {
    dense: {"first": np.zeros((48, 5)), "bias": np.zeros(5), "second": np.zeros((5, 2))},
    convolutional: {"kernel": np.zeros((3, 3, 3, 5)), "second": np.zeros((20, 2))},
}
BYTES = {loss: 4 * sum(x.size for x in tree.values()) for loss, tree in PARAMS.items()}


def collectives(method, layout: Layout, loss, inner_stages: int | None) -> list[Audited]:
    """Those of a number of inner stages, or (None) of the end of a round."""
    round_fn = RoundFn(method, layout)
    state = round_fn.init(PARAMS[loss], jax.random.key(0))
    if inner_stages is None:
        program, batches = round_fn._programs.get(Piece(0, True), state), ()
    else:
        program = round_fn._programs.get(Piece(inner_stages, False), state)
        shape = (inner_stages * method.inner.steps, *layout.shape, *IMAGES)
        batches = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled = program.lower(state, batches, round_fn.context).compile()
    return audit(compiled, round_fn.mesh)


FLAT = Layout(workers_per_hub=16)  # two workers on each of eight devices
HUBS = Layout(hubs=4, workers_per_hub=2)


def described(found: list[Audited]) -> list[tuple]:
    return [(one.kind, one.axes, one.dtype, one.nbytes, one.loops) for one in found]


@pytest.mark.parametrize("worker_map", ["map", "vmap"])
@pytest.mark.parametrize(
    "loss",
    [dense, pytest.param(convolutional, marks=pytest.mark.slow)],
    ids=lambda loss: loss.__name__,
)
def test_no_collective_runs_in_the_local_steps_of_local_sgd(loss, worker_map):
    grad_fn = jaxlocal.gradients(loss)
    method = jaxlocal.local_sgd(grad_fn, optax.adam(0.1), period=4, worker_map=worker_map)
    assert collectives(method, FLAT, loss, inner_stages=4) == []


def test_data_parallelism_averages_its_gradients_and_loss_inside_the_loop_of_steps():
    method = jaxlocal.data_parallel(jaxlocal.gradients(dense), optax.adam(0.1))
    found = collectives(method, FLAT, dense, inner_stages=4)
    assert described(found) == [("all-reduce", ("workers",), "float32", BYTES[dense] + 4, (4,))]


@pytest.mark.parametrize("loss", [dense, convolutional], ids=lambda loss: loss.__name__)
def test_local_sgd_ends_a_round_with_one_all_reduce_of_the_model(loss):
    method = jaxlocal.local_sgd(jaxlocal.gradients(loss), optax.adam(0.1), period=4)
    found = collectives(method, FLAT, loss, inner_stages=None)
    assert described(found) == [("all-reduce", ("workers",), "float32", BYTES[loss], ())]


def mll_sgd(graph: str):
    matrix = topology.mixing_matrix(topology.hub_graph(graph, 4), HUBS.hub_weight)
    return jaxlocal.mll_sgd(
        jaxlocal.gradients(dense), optax.sgd(0.1), matrix=matrix, local_steps=4, hub_period=2
    )


@pytest.mark.parametrize("times, loops", [(1, ()), (4, (4,))])
def test_hub_averages_stay_within_the_hubs_and_outside_the_loop_of_steps(times, loops):
    found = collectives(mll_sgd("ring"), HUBS, dense, inner_stages=times)
    assert described(found) == [("all-reduce", ("workers",), "float32", BYTES[dense], loops)]


@pytest.mark.parametrize("graph, hops", [("ring", 2), ("path", 2), ("star", 3)])
def test_hubs_pass_models_to_their_neighbours_and_no_device_gathers_all(graph, hops):
    found = collectives(mll_sgd(graph), HUBS, dense, inner_stages=None)
    passed = ("collective-permute", ("hubs",), "float32", BYTES[dense], ())
    assert described(found) == [passed] * hops


def test_a_complete_hub_graph_is_one_all_reduce_across_hubs():
    found = collectives(mll_sgd("complete"), HUBS, dense, inner_stages=None)
    assert described(found) == [("all-reduce", ("hubs",), "float32", BYTES[dense], ())]
