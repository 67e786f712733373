"""The bits that a run sends, against a count by hand of who sends to whom at which step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn
from jaxlocal.communication import topology
from jaxlocal.training import loop as training
from jaxlocal.types import MessageBits

PARAMS = {"weight": np.zeros(3, np.float32), "bias": jnp.zeros((), jnp.bfloat16)}
MODEL_BITS = 3 * 32 + 16

grad_fn = jaxlocal.gradients(
    lambda params, batch, key: (params["weight"] * batch).sum() + params["bias"].astype(jnp.float32)
)


def slow_count(layout, adjacency, steps, hub_averages, round_ends, copies=1):
    """Bits by hand: at a hub average every worker sends its model to its hub unless it is the only
    one there; at the end of a round every hub sends its model to each of its neighbours."""
    workers, hubs = np.zeros(layout.workers, int), np.zeros(layout.hubs, int)
    for now in range(1, steps + 1):
        if now in hub_averages and layout.workers_per_hub > 1:
            workers += copies * MODEL_BITS
        if now in round_ends:
            for hub, other in np.argwhere(adjacency):
                hubs[hub] += copies * MODEL_BITS * (hub != other)
    return MessageBits(int(workers.max()), int(hubs.max()))


def hubs(graph, size):
    adjacency = topology.hub_graph(graph, size)
    return adjacency, topology.mixing_matrix(adjacency, np.full(size, 1 / size))


NO_HUBS = np.zeros((1, 1))
RING, STAR, COMPLETE = (hubs(graph, 4) for graph in ("ring", "star", "complete"))
SGD, ADAM = optax.sgd(0.1), optax.adam(0.1)
EVERY, EVEN = range(1, 99), range(2, 99, 2)
BY_FOUR = (4, 8, 10)  # ends of rounds of 4 steps, the last clipped by the end of the run
COUNTED = {
    "local_sgd": (
        jaxlocal.local_sgd(grad_fn, SGD, period=4),
        Layout(workers_per_hub=3),
        (NO_HUBS, BY_FOUR, BY_FOUR),
    ),
    "local_sgd, one worker": (
        jaxlocal.local_sgd(grad_fn, SGD, period=4),
        Layout(),
        (NO_HUBS, BY_FOUR, BY_FOUR),
    ),
    "local_sgd, Adam's two moments averaged": (
        jaxlocal.local_sgd(grad_fn, ADAM, period=4, optimizer_state="average"),
        Layout(workers_per_hub=3),
        (NO_HUBS, BY_FOUR, BY_FOUR, 3),
    ),
    "local_sgd, Adam reset": (
        jaxlocal.local_sgd(grad_fn, ADAM, period=4, optimizer_state="reset"),
        Layout(workers_per_hub=3),
        (NO_HUBS, BY_FOUR, BY_FOUR),
    ),
    "local_sgd over hubs": (
        jaxlocal.local_sgd(grad_fn, SGD, period=4),
        Layout(4, 2),
        (COMPLETE[0], BY_FOUR, BY_FOUR),
    ),
    "swap": (
        jaxlocal.swap(grad_fn, SGD, switch_step=2),
        Layout(workers_per_hub=3),
        (NO_HUBS, (1, 2, 10), (1, 2, 10)),
    ),
    "data_parallel": (
        jaxlocal.data_parallel(grad_fn, SGD),
        Layout(workers_per_hub=3),
        (NO_HUBS, EVERY, ()),
    ),
    "mll_sgd, ring": (
        jaxlocal.mll_sgd(
            grad_fn, SGD, matrix=RING[1], local_steps=1, hub_period=4
        ),  # four hub averages in one dispatch
        Layout(4, 2),
        (RING[0], EVERY, BY_FOUR),
    ),
    "mll_sgd, star, momentum averaged": (
        jaxlocal.mll_sgd(
            grad_fn,
            optax.sgd(0.1, 0.9),
            matrix=STAR[1],
            local_steps=2,
            hub_period=2,
            optimizer_state="average",
        ),
        Layout(4, 2),
        (STAR[0], EVEN, BY_FOUR, 2),
    ),
    "mll_sgd, complete, one worker per hub": (
        jaxlocal.mll_sgd(grad_fn, SGD, matrix=COMPLETE[1], local_steps=2, hub_period=2),
        Layout(4, 1),
        (COMPLETE[0], EVEN, BY_FOUR),
    ),
    "cooperative_sgd": (
        jaxlocal.cooperative_sgd(grad_fn, SGD, matrix=RING[1], period=4),
        Layout(4, 1),
        (RING[0], (), BY_FOUR),
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_message_bits_equal_a_slow_count_at_every_step(name):
    method, layout, (adjacency, *counted) = COUNTED[name]
    round_fn = RoundFn(method, layout, jaxlocal.make_mesh(layout, jax.devices()[:1]))
    state, last = round_fn.init(PARAMS, jax.random.key(0)), None
    batches = lambda start, steps: np.ones((steps, *layout.shape, 3), np.float32)
    for last in training.run(round_fn, state, batches, 10):
        assert last.message_bits == slow_count(layout, adjacency, last.step, *counted)
        assert last.round == sum(end <= last.step for end in counted[1] or range(1, 11))
    assert last.step == 10
