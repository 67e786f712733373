"""Sharded workers, larger than a device, give the same numbers as whole ones and stay sharded, and
each device sends its shard to the other workers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn, compression, make_mesh
from jaxlocal.communication import topology
from jaxlocal.communication.accounting import by_kind
from jaxlocal.communication.audit import audit
from jaxlocal.models.transformers import transformer
from jaxlocal.nn import conv_general_dilated, max_pool
from jaxlocal.parallel import sharding
from jaxlocal.training.checkpoints import Checkpoints
from jaxlocal.training.evaluation import Evaluation, Reestimation

LENGTH, TOKENS = 8, 16
FLAT, HUBS = Layout(workers_per_hub=4, weights=[1, 2, 3, 4]), Layout(hubs=4, rates=[1, 0.5, 1, 0.5])
WHOLE, MESH, LEAST = (1, 1), (1, 2, 4), 64
language = transformer((LENGTH,), TOKENS, layers=1, width=8, heads=2)


def next_tokens(params, batch, key):
    logits, _ = language.apply(params, {}, batch[:, :-1], key, True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def perceptron(params, batch, key):
    hidden = jax.nn.relu(batch @ params["first"] + params["bias"][None])
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
}  # [steps, workers, batch, ...]


def ring():
    return topology.mixing_matrix(topology.hub_graph("ring", 4), HUBS.hub_weight)


METHODS = {
    "local_sgd": lambda g, o, **k: jaxlocal.local_sgd(g, o, period=4, **k),
    "mll_sgd": lambda g, o, **k: jaxlocal.mll_sgd(
        g, o, matrix=ring(), local_steps=2, hub_period=2, **k
    ),
    "diloco": lambda g, o, **k: jaxlocal.diloco(g, o, period=4, **k),
    "cser": lambda g, o, **k: jaxlocal.cser(
        g,
        o,
        gradient_compressor=compression.parse("grbs:4"),
        reset_compressor=compression.parse("grbs:2"),
        period=4,
        **k,
    ),
}


@functools.cache
def _round_fn_on(mesh, method, loss, worker_map):
    least = LEAST if loss is next_tokens else 0
    return with_rule(sharding.fsdp((*mesh, 1)[2], least), mesh, method, loss, worker_map)


def round_fn_on(mesh, method="local_sgd", loss=perceptron, worker_map="map"):
    """The round on a mesh of a shape, compiled once; only small leaves of the language model are
    not sharded."""
    return _round_fn_on(mesh, method, loss, worker_map)


def with_rule(rule, mesh, method="local_sgd", loss=perceptron, worker_map="map"):
    grad_fn, optimizer = jaxlocal.gradients(loss), optax.sgd(0.1, 0.9)
    layout = HUBS if method == "mll_sgd" else FLAT
    method = METHODS[method](grad_fn, optimizer, worker_map=worker_map)
    return RoundFn(method, layout, make_mesh(layout, shape=mesh), sharding=rule)


def batches_of(round_fn, loss):
    examples = EXAMPLES[loss]
    return examples.reshape(len(examples), *round_fn.layout.shape, *examples.shape[2:])


def trained(round_fn, loss, rounds=2):
    """State and losses after a number of rounds of four steps."""
    state = round_fn.init(PARAMS[loss], jax.random.key(1))
    batches, losses = batches_of(round_fn, loss), []
    for start in range(0, 4 * rounds, 4):
        state, info = round_fn(state, batches[start : start + 4])
        losses.append(np.asarray(info.worker["loss"]))
    return state, np.concatenate(losses)


@functools.cache
def trained_whole(method, loss):
    return trained(round_fn_on(WHOLE, method, loss), loss)


def assert_close(one, other):
    """Up to the rounding of float32: sums are taken in another order."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), one, other)


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def assert_sharded_as(state, shapes):
    for x, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert x.sharding.is_equivalent_to(shape.sharding, x.ndim)


@pytest.mark.parametrize(
    ("method", "loss", "mesh", "worker_map"),
    [
        ("local_sgd", next_tokens, (1, 2, 4), "map"),
        ("local_sgd", convolutional, (1, 2, 4), "map"),
        ("local_sgd", convolutional, (1, 2, 2), "vmap"),
        ("local_sgd", perceptron, (1, 1, 8), "vmap"),
        ("mll_sgd", perceptron, (1, 1, 4), "map"),
        ("mll_sgd", perceptron, (2, 1, 2), "map"),
        ("mll_sgd", perceptron, (4, 1, 2), "vmap"),
        ("diloco", perceptron, (1, 2, 4), "map"),
        ("cser", perceptron, (1, 2, 4), "map"),
    ],
)
def test_sharded_workers_train_as_whole_ones(method, loss, mesh, worker_map):
    round_fn = round_fn_on(mesh, method, loss, worker_map)
    state, losses = trained(round_fn, loss)
    expected, expected_losses = trained_whole(method, loss)
    assert_close(losses, expected_losses)
    assert_close(as_numpy(state.params), as_numpy(expected.params))
    assert_close(as_numpy(state.opt_state), as_numpy(expected.opt_state))
    assert_sharded_as(state, round_fn.shapes(PARAMS[loss]))


@functools.cache
def language_round(mesh=MESH):
    """Local SGD with momentum on the transformer, the shapes of its state, and batches."""
    round_fn = round_fn_on(mesh, loss=next_tokens)
    state = round_fn.shapes(PARAMS[next_tokens])
    return round_fn, state, batches_of(round_fn, next_tokens)[:4]


def compiled(which, mesh=MESH):
    round_fn, state, batches = language_round(mesh)
    lowered = [program for _, program in round_fn.lower(state, batches)]
    return lowered[-1 if which == "outer" else 0].compile()


def worker_and_shard_sizes(tree):
    """Elements of one worker's leaves, and the number of them on one of its four devices."""
    sizes = [x.size // FLAT.workers for x in jax.tree.leaves(tree)]
    sharded = lambda x: math.prod(x.shape) >= LEAST * FLAT.workers
    return sum(sizes), sum(
        n // 4 if sharded(x) else n for n, x in zip(sizes, jax.tree.leaves(tree), strict=True)
    )


def test_a_device_holds_its_shard_of_a_worker():
    _, state, _ = language_round()
    for tree in (state.params, state.opt_state):
        whole, shard = worker_and_shard_sizes(tree)
        held = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))
        assert held == 2 * shard  # of two workers
        assert shard < 0.4 * whole


@pytest.mark.optimized
def test_each_device_sends_its_shard_of_the_model_to_other_workers():
    round_fn, state, _ = language_round()
    sent = by_kind(one.collective() for one in audit(compiled("outer"), round_fn.mesh))
    _, shard = worker_and_shard_sizes(state.params)
    assert sent == {("all-reduce", ("workers",), "float32"): 4 * shard}
    assert sent == by_kind(round_fn.collectives(state, 1))


@pytest.mark.optimized
def test_in_local_steps_only_the_devices_of_one_worker_communicate():
    found = audit(compiled(4), language_round()[0].mesh)
    assert found and {one.axes for one in found} == {("model",)}
    assert all(one.loops for one in found)


@pytest.mark.optimized
def test_the_devices_of_a_worker_divide_its_batch():
    whole, sharded = (compiled(4, mesh).cost_analysis() for mesh in (WHOLE, MESH))
    assert sharded["flops"] < 0.4 * whole["flops"]


def test_a_checkpoint_resumes_on_any_mesh(tmp_path):
    def restored(folder, mesh):
        with Checkpoints(folder) as checkpoints:
            shapes = round_fn_on(mesh).shapes(PARAMS[perceptron])
            state, _ = checkpoints.restore(shapes)
            assert_sharded_as(state, shapes)
            return state

    state = round_fn_on((1, 2, 2)).init(PARAMS[perceptron], jax.random.key(2))
    state = state._replace(params=jax.tree.map(lambda x: x * (1 + x), state.params))
    values = [as_numpy(state.params)]
    for number, mesh in enumerate([(1, 1), (1, 1, 4), (1, 4, 2)]):
        with Checkpoints(tmp_path / str(number)) as checkpoints:
            checkpoints.save(state)
        state = restored(tmp_path / str(number), mesh)
        values.append(as_numpy(state.params))
    for later in values[1:]:
        jax.tree.map(np.testing.assert_array_equal, later, values[0])


def outputs(params, model_state, batch):
    return {"output": (batch["x"] @ params["first"] + model_state["shift"][None]).sum(-1)}


@functools.cache
def measured(mesh):
    """The metrics, mean and consensus distance of workers whose models differ, with the model state
    re-estimated at their mean."""
    round_fn = round_fn_on(mesh)
    state = round_fn.init(PARAMS[perceptron], jax.random.key(0), {"shift": jnp.zeros(8)})
    first = jax.device_put(drawn(7, 1, 4, 12, 8), state.params["first"].sharding)
    state = state._replace(params={**state.params, "first": first})
    estimate = lambda params, state, batch: {"shift": batch["x"].mean(0)[:8] * params["bias"]}
    state = Reestimation(round_fn, estimate, {"x": drawn(6, 3, 1, 4, 8, 12)})(state)
    metrics = Evaluation(round_fn, outputs, {"x": drawn(5, 37, 12)}, batch_size=3)(state)
    return metrics, as_numpy(round_fn.mean(state)), float(round_fn.consensus_distance(state))


@pytest.mark.parametrize("mesh", [(1, 2, 2), (1, 1, 4)])
def test_sharded_workers_are_evaluated_as_whole_ones(mesh):
    assert_close(measured(mesh), measured(WHOLE))
    _, (_, statistics), distance = measured(mesh)
    assert distance > 1 and statistics["shift"].all()


def test_a_loss_may_gather_its_parameters_itself():
    def loss(params, batch, key):
        first, second = (sharding.unshard(params[name]) for name in ("first", "second"))
        return jnp.square(jax.nn.relu(batch @ first + params["bias"][None]) @ second - 1).mean()

    method = jaxlocal.local_sgd(
        jaxlocal.gradients(loss, gathered=False), optax.sgd(0.1, 0.9), period=4
    )
    round_fn = RoundFn(method, FLAT, make_mesh(FLAT, shape=(1, 2, 2)))
    _, losses = trained(round_fn, perceptron)
    assert_close(losses, trained_whole("local_sgd", perceptron)[1])
