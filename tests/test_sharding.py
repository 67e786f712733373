"""Workers larger than a device: split over the mesh axis `model`, they give the same numbers, keep
their places, and say the same to each other, each device its part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn, compression, make_mesh, sharding, topology
from jaxlocal.models.transformer import transformer
from jaxlocal.nn import conv_general_dilated, max_pool

LENGTH, TOKENS = 8, 16
FLAT, HUBS = Layout(workers_per_hub=4, weights=[1, 2, 3, 4]), Layout(hubs=4, rates=[1, 0.5, 1, 0.5])
WHOLE = (1, 1)
language = transformer((LENGTH,), TOKENS, layers=1, width=8, heads=2)


def next_tokens(params, batch, key):
    logits, _ = language.apply(params, {}, batch[:, :-1], key, True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def perceptron(params, batch, key):
    hidden = jax.nn.relu(batch @ params["first"] + params["bias"])
    return jnp.square(hidden @ params["second"] - 1).mean()


def convolutional(params, batch, key):
    images = conv_general_dilated(
        batch, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    pooled = max_pool(jax.nn.relu(images), (2, 2), (2, 2))
    return jnp.square(pooled.reshape(len(batch), -1) @ params["second"] - 1).mean()


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {
    next_tokens: language.init(jax.random.key(3))[0],
    perceptron: {
        "first": drawn(0, 12, 8) / 4,
        "bias": drawn(1, 8) / 4,
        "second": drawn(2, 8, 4) / 4,
    },
    convolutional: {"kernel": drawn(0, 3, 3, 3, 8) / 5, "second": drawn(1, 32, 4) / 6},
}
EXAMPLES = {
    next_tokens: np.random.default_rng(0).integers(0, TOKENS, (8, 4, 8, LENGTH + 1), np.int32),
    perceptron: drawn(3, 8, 4, 8, 12),
    convolutional: drawn(4, 8, 4, 8, 4, 4, 3),
}  # [ticks, workers, batch, ...]


def ring():
    return topology.mixing_matrix(topology.hub_graph("ring", 4), HUBS.hub_weight)


METHODS = {
    "local_sgd": lambda g, o, **k: jaxlocal.local_sgd(g, o, 4, **k),
    "mll_sgd": lambda g, o, **k: jaxlocal.mll_sgd(g, o, ring(), 2, 2, **k),
    "diloco": lambda g, o, **k: jaxlocal.diloco(g, o, 4, **k),
    "cser": lambda g, o, **k: jaxlocal.cser(
        g, o, compression.parse("grbs:4"), compression.parse("grbs:2"), 4, **k
    ),
}


def rounds_on(mesh, method="local_sgd", loss=perceptron, least=0, rule=None, **options):
    """The compiled rounds on a mesh of a shape; small leaves are split too."""
    rounds = METHODS[method](jaxlocal.gradients(loss), optax.sgd(0.1, 0.9), **options)
    layout = HUBS if method == "mll_sgd" else FLAT
    rule = rule or sharding.fsdp((*mesh, 1)[2], least)
    return RoundFn(rounds, layout, make_mesh(layout, shape=mesh), sharding=rule)


def batches_of(round_fn, loss):
    examples = EXAMPLES[loss]
    return examples.reshape(len(examples), *round_fn.layout.shape, *examples.shape[2:])


def trained(round_fn, loss, rounds=2):
    """State and losses after some rounds of four ticks."""
    state = round_fn.init(PARAMS[loss], jax.random.key(1))
    batches, losses = batches_of(round_fn, loss), []
    for start in range(0, 4 * rounds, 4):
        state, info = round_fn(state, batches[start : start + 4])
        losses.append(np.asarray(info.worker["loss"]))
    return state, np.concatenate(losses)


@functools.cache
def trained_whole(method, loss):
    return trained(rounds_on(WHOLE, method, loss), loss)


def assert_close(one, other):
    """To float32 rounding: sums are taken in another order."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), one, other)


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def assert_in_place(state, shapes):
    for x, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert x.sharding.is_equivalent_to(shape.sharding, x.ndim)


@pytest.mark.parametrize(
    ("method", "loss", "mesh", "worker_map"),
    [
        ("local_sgd", next_tokens, (1, 2, 4), "map"),
        ("local_sgd", next_tokens, (1, 4, 2), "vmap"),
        ("local_sgd", convolutional, (1, 2, 4), "map"),
        ("local_sgd", convolutional, (1, 2, 2), "vmap"),
        ("mll_sgd", perceptron, (2, 1, 2), "map"),
        ("mll_sgd", perceptron, (4, 1, 2), "vmap"),
        ("diloco", perceptron, (1, 2, 4), "map"),
        ("cser", perceptron, (1, 2, 4), "map"),
    ],
)
def test_split_workers_train_as_whole_ones(method, loss, mesh, worker_map):
    least = 64 if loss is next_tokens else 0
    split = rounds_on(mesh, method, loss, least, worker_map=worker_map)
    (state, losses), (expected, expected_losses) = trained(split, loss), trained_whole(method, loss)
    assert_close(losses, expected_losses)
    assert_close(as_numpy(state.params), as_numpy(expected.params))
    assert_close(as_numpy(state.opt_state), as_numpy(expected.opt_state))
    assert_in_place(state, split.shapes(PARAMS[loss]))
    assert_close(split.consensus_distance(state), trained_distance(method, loss, expected))


def trained_distance(method, loss, state):
    return rounds_on(WHOLE, method, loss).consensus_distance(state)
