"""Layouts, meshes, keys, functions that are run for every worker, and their averages."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxlocal import ConfigurationError, Layout, make_mesh
from jaxlocal.parallel import collectives, keys, worker_maps
from jaxlocal.parallel.keys import GRADIENT, RATE
from jaxlocal.parallel.layout import CONTEXT, STACKED


def refused(message):
    return pytest.raises(ConfigurationError, match=re.escape(message))


def test_weights_and_rates_are_one_number_one_per_worker_of_a_hub_or_one_per_worker():
    assert (Layout(2, 3).weight == 1 / 6).all()
    assert (Layout(2, 3, weights=5).weight == 1 / 6).all()
    per_hub = Layout(2, 3, weights=[1, 2, 3])
    np.testing.assert_allclose(per_hub.weight, np.array([[1, 2, 3], [1, 2, 3]]) / 12)
    per_worker = Layout(2, 3, weights=range(1, 7))
    np.testing.assert_allclose(per_worker.weight, np.array([[1, 2, 3], [4, 5, 6]]) / 21)
    a_column = Layout(2, 3, weights=[[1], [2]])
    np.testing.assert_allclose(a_column.weight, np.array([[1, 1, 1], [2, 2, 2]]) / 9)
    np.testing.assert_allclose(a_column.hub_weight, [1 / 3, 2 / 3])
    assert (Layout(2, 3, rates=[0.1, 0.2, 0.3]).rate == [[0.1, 0.2, 0.3]] * 2).all()
    assert (Layout(hubs=2, rates=[0.5, 1.0]).rate == [[0.5], [1.0]]).all()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_shares_sum_to_one_over_all_and_in_each_hub(hubs, count, seed):
    weights = 10 ** np.random.default_rng(seed).uniform(-3, 3, (hubs, count))
    layout = Layout(hubs, count, weights)
    context = layout.context()
    # Sums of at most 36 float64 numbers.
    np.testing.assert_allclose(context.weight.sum(), 1, rtol=1e-14)
    np.testing.assert_allclose(context.hub_share.sum(axis=1), 1, rtol=1e-14)
    np.testing.assert_allclose(layout.hub_weight[:, None] * context.hub_share, context.weight)
    np.testing.assert_allclose(context.weight / context.weight[0, 0], weights / weights[0, 0])
    np.testing.assert_array_equal(context.worker.ravel(), np.arange(layout.workers))
    assert context.worker.dtype == np.int32 and context.worker.shape == layout.shape


def test_wrong_grids_weights_and_rates_are_refused():
    with refused("hubs must be an integer of at least 1, got 0"):
        Layout(0, 4)
    with refused("workers_per_hub must be an integer of at least 1, got -1"):
        Layout(2, -1)
    for wrong in (0.0, -2.0, float("nan"), float("inf")):
        with refused(f"worker weights must be > 0 and finite, got {wrong}"):
            Layout(1, 2, weights=[wrong, 1])
    for wrong in (0.0, 1.5, 1.0000001, -0.25, float("nan")):
        with refused(f"worker rates must be in (0, 1], got {wrong}"):
            Layout(1, 3, rates=[0.5, wrong, 1])
    with refused("4 weights do not fit 2 hubs × 3 workers: give one, 3 (a hub's) or 6"):
        Layout(2, 3, weights=[1, 2, 3, 4])
    with refused("5 rates do not fit 2 hubs × 3 workers"):
        Layout(2, 3, rates=[0.5] * 5)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout(1, 1), (1, 1)),
        (Layout(1, 8), (1, 8)),
        (Layout(8, 1), (8, 1)),
        (Layout(4, 4), (4, 2)),
        (Layout(100, 1), (5, 1)),
        (Layout(1, 7), (1, 7)),
        (Layout(1, 11), (1, 1)),
        (Layout(3, 2), (3, 2)),
        (Layout(5, 20), (5, 1)),  # hubs before workers where both use as many devices
    ],
)
def test_a_mesh_uses_as_many_devices_as_the_grid_divides_over(layout, shape):
    assert make_mesh(layout, jax.devices()[:8]).devices.shape == shape
    assert make_mesh(layout, jax.devices()[:1]).devices.shape == (1, 1)


def test_a_mesh_of_a_shape_has_that_shape_and_its_devices_in_order():
    devices = jax.devices()
    mesh = make_mesh(Layout(4, 6), devices[1:], shape=(2, 3))
    assert mesh.axis_names == ("hubs", "workers")
    assert list(mesh.devices.ravel()) == devices[1:7]


def test_a_third_size_shards_every_worker_over_neighbouring_devices():
    mesh = make_mesh(Layout(2, 2), shape=(2, 1, 4))
    assert mesh.axis_names == ("hubs", "workers", "model")
    assert [[d.id for d in row] for row in mesh.devices[:, 0]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert make_mesh(Layout(2, 2), shape=(2, 1, 1)).axis_names == ("hubs", "workers")


def test_meshes_that_do_not_fit_are_refused():
    with refused("a 1 × 3 × 4 mesh needs 12 devices, and there are 8"):
        make_mesh(Layout(1, 3), jax.devices()[:8], shape=(1, 3, 4))
    with refused("a worker cannot be sharded over 0 devices"):
        make_mesh(Layout(1, 3), shape=(1, 3, 0))
    with refused("a mesh is hubs × workers or hubs × workers × model, got 1 × 1 × 1 × 1"):
        make_mesh(Layout(1, 3), shape=(1, 1, 1, 1))
    with refused("4 hubs do not divide over 3 devices of the mesh axis 'hubs'"):
        make_mesh(Layout(4, 6), shape=(3, 1))
    with refused("6 workers do not divide over 4 devices of the mesh axis 'workers'"):
        make_mesh(Layout(4, 6), shape=(2, 4))
    with refused("4 hubs do not divide over 0 devices"):
        make_mesh(Layout(4, 6), shape=(0, 1))
    with refused("a 4 × 6 mesh needs 24 devices, and there are 8"):
        make_mesh(Layout(4, 6), jax.devices()[:8], shape=(4, 6))


def test_keys_differ_by_purpose_step_and_worker():
    root, seen = jax.random.key(3), set()
    steps, numbers = jnp.arange(40), jnp.arange(20)
    for purpose in (GRADIENT, RATE):
        each = jax.vmap(
            lambda t, p=purpose: jax.vmap(lambda w: keys.stream_key(root, p, t, w))(numbers)
        )(steps)
        common = jax.vmap(lambda t, p=purpose: keys.stream_key(root, p, t))(steps)
        for drawn in (each, common):
            seen |= {tuple(row) for row in jax.random.key_data(drawn).reshape(-1, 2).tolist()}
    assert len(seen) == 2 * (40 * 20 + 40)
    again = keys.stream_key(jax.random.key(3), RATE, 7, 5)
    assert tuple(jax.random.key_data(again).tolist()) in seen
    other = keys.stream_key(jax.random.key(4), RATE, 7, 5)
    assert tuple(jax.random.key_data(other).tolist()) not in seen


def on_mesh(fn, layout, shape, *trees, out=STACKED):
    mapped = jax.shard_map(
        fn,
        mesh=make_mesh(layout, shape=shape),
        in_specs=(CONTEXT,) + (STACKED,) * len(trees),
        out_specs=out,
    )
    return jax.tree.map(np.asarray, jax.jit(mapped)(layout.context(), *trees))


@pytest.mark.parametrize("mesh", [(1, 1), (2, 3)])
@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_a_function_of_one_worker_is_run_for_each(mode, mesh):
    layout = Layout(2, 3)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)

    def one(x, worker):
        assert x.shape == (4,) and worker.shape == ()
        return {"shifted": x + worker.astype(x.dtype), "largest": x.max(), "constant": jnp.ones(2)}

    out = on_mesh(
        lambda context, x: worker_maps.over_workers(one, mode)(x, context.worker), layout, mesh, x
    )
    np.testing.assert_allclose(out["shifted"], x + np.arange(6).reshape(2, 3, 1), rtol=1e-6)
    np.testing.assert_array_equal(out["largest"], x.max(axis=-1))
    np.testing.assert_array_equal(out["constant"], np.ones((2, 3, 2)))


def test_an_unknown_worker_map_is_refused_with_the_nearest_names():
    with refused(
        "unknown worker map 'vmapp'; did you mean 'vmap' or 'map'? known: vmap, map, blocks:N"
    ):
        worker_maps.over_workers(lambda x: x, "vmapp")


def test_convolutions_are_found_at_any_depth():
    image, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 2))

    def convolve(x, k):
        return lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def pool(x, k):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def deep(x, k):
        inner = jax.jit(jax.checkpoint(convolve))
        body = lambda carry, _: (lax.cond(carry > 0, lambda: inner(x, k).sum(), lambda: 0.0), None)
        return lax.scan(body, 1.0, None, length=2)[0]

    found = lambda fn: worker_maps.has_convolution(jax.make_jaxpr(fn)(image, kernel))
    assert found(convolve) and found(pool) and found(deep) and found(jax.grad(deep))
    assert not found(lambda x, k: jnp.tanh(x).sum() + k.sum() + jnp.linalg.norm(x[0, 0] @ k[0, 0]))


def test_the_worker_map_depends_on_backend_and_convolutions(monkeypatch):
    shape = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
    pool = lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    assert worker_maps.worker_map_for(jnp.sin, shape) == "map"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert worker_maps.worker_map_for(jnp.sin, shape) == "vmap"
    assert worker_maps.worker_map_for(pool, shape) == "map"


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_mean_and_consensus_distance(mesh):
    layout = Layout(2, 2, weights=[1, 2, 3, 4])
    random = np.random.default_rng(0)
    tree = {"w": random.normal(size=(2, 2, 3)), "b": random.normal(size=(2, 2))}
    tree = jax.tree.map(np.float32, tree)
    mean, distance = on_mesh(
        lambda context, x: (
            collectives.mean(x, context),
            collectives.consensus_distance(x, context),
        ),
        layout,
        mesh,
        tree,
        out=P(),
    )
    expected = {k: np.einsum("dn,dn...->...", layout.weight, x) for k, x in tree.items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), mean, expected)
    squares = ((tree["w"] - expected["w"]) ** 2).sum(axis=-1) + (tree["b"] - expected["b"]) ** 2
    np.testing.assert_allclose(distance, np.sqrt((layout.weight * squares).sum()), rtol=1e-5)


def test_the_distance_of_consensus_is_zero():
    layout = Layout(2, 2, weights=[1, 2, 4, 8])  # shares of fifteenths do not sum exactly
    alike = np.full((2, 2, 5), 3.0, np.float32)
    distance = on_mesh(
        lambda context, x: collectives.consensus_distance(x, context),
        layout,
        (2, 2),
        alike,
        out=P(),
    )
    assert distance < 1e-5


def test_means_keep_the_dtypes_of_leaves():
    tree = {"half": np.ones((2, 2, 3), jnp.bfloat16), "count": np.full((2, 2), 7, np.int32)}
    mean = on_mesh(
        lambda context, x: collectives.mean(x, context), Layout(2, 2), (2, 1), tree, out=P()
    )
    assert mean["half"].dtype == jnp.bfloat16 and (mean["half"] == 1).all()
    assert mean["count"].dtype == np.int32 and mean["count"] == 7


@pytest.mark.parametrize("over", ["workers", "all"])
def test_weighted_sums_of_half_precision_are_in_float32(over):
    weight = np.random.default_rng(0).uniform(size=(3, 64)).astype(np.float32)
    x = np.random.default_rng(1).normal(1, 0.1, (3, 64, 5)).astype(jnp.bfloat16)
    total = collectives.weighted_sum(weight, jnp.asarray(x), over)
    expected = (weight[..., None] * x.astype(np.float64)).sum(axis=1, keepdims=True)
    if over == "all":
        expected = expected.sum(axis=0, keepdims=True)
    assert total.dtype == jnp.float32 and total.shape == expected.shape
    # 192 terms, each rounded at 6e-8; bfloat16 would round them at 4e-3.
    np.testing.assert_allclose(total, expected, rtol=1e-5)
