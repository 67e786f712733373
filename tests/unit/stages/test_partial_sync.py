"""Partial synchronisation against its equation, worker by worker, and the messages it sends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlocal import Layout, compression, make_mesh
from jaxlocal.communication import mixing
from jaxlocal.communication.accounting import by_kind
from jaxlocal.communication.audit import audit
from jaxlocal.communication.topology import hub_graph, mixing_matrix
from jaxlocal.parallel.collectives import broadcast_to_workers
from jaxlocal.parallel.layout import CONTEXT, STACKED
from jaxlocal.stages.partial_sync import partial_sync

KEY = jax.random.key(3)
LAYOUT = Layout(2, 4, weights=1 + np.arange(8) % 3)
SPECS = [
    *("identity", "zero", "grbs:3", "random_k:3", "top_k:3", "top_k:4:model", "sign", "qsgd:3"),
    *("int8", "bfloat16", "powersgd:2", "grbs:2+int8", "top_k:3+qsgd:4"),
]


def trees(layout=LAYOUT):
    random = np.random.default_rng(0)
    shapes = {"kernel": (5, 6), "bias": (10,), "scale": ()}
    draw = lambda shape: jnp.asarray(random.normal(size=(*layout.shape, *shape)), jnp.float32)
    return {name: draw(shape) for name, shape in shapes.items()}


def compiled(mixer, compressor, layout, mesh_shape):
    """A program (trees of all workers, context) -> (new values, residuals, the common part)."""

    def program(tree, context):
        one = jax.tree.map(lambda x: x[0, 0], tree)
        kept = jax.tree.map(
            lambda x: jnp.broadcast_to(x, context.worker.shape + x.shape), compressor.init(one)
        )
        out = partial_sync(mixer, compressor, tree, kept, KEY, context)
        new = out.add(out.residual)
        common = out.add(jax.tree.map(lambda x: jnp.zeros_like(x[:, :1]), tree))
        return new, out.residual, broadcast_to_workers(common, tree)

    mesh = make_mesh(layout, shape=mesh_shape)
    places = {"in_specs": (STACKED, CONTEXT), "out_specs": STACKED}
    return jax.jit(jax.shard_map(program, mesh=mesh, **places))


def synced(mixer, spec, tree, layout, mesh_shape):
    """The new values of all workers after a partial synchronisation, their residuals, and the
    common part."""
    program = compiled(mixer, compression.parse(spec), layout, mesh_shape)
    return jax.tree.map(np.asarray, program(tree, layout.context()))


@functools.cache
def compressed(spec, layout):
    """s_i = C(x_i) of `trees`, one worker after another; leaves [K, ...]."""
    compressor, tree = compression.parse(spec), trees(layout)

    @jax.jit
    def compress(x, key):
        nothing = jax.tree.map(jnp.zeros_like, x)
        return compressor.decode(compressor.encode(x, (), key), KEY, nothing, 1.0)

    found = []
    for worker, place in enumerate(np.ndindex(layout.shape)):
        key = KEY if compressor.shared_mask else jax.random.fold_in(KEY, worker)
        found.append(compress(jax.tree.map(lambda x, at=place: x[at], tree), key))
    return jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float64), *found)


def by_the_equation(matrix, spec, layout=LAYOUT):
    """x_i ← Σ_j W_ji s_j + x_i − s_i, and x_i − s_i."""
    sent = compressed(spec, layout)
    stacked = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), trees(layout))
    mixed = jax.tree.map(lambda s: np.einsum("ji,j...->i...", matrix, s), sent)
    grid = lambda x: np.asarray(x).reshape(*layout.shape, *x.shape[1:])
    residual = jax.tree.map(lambda x, s: x - s, stacked, sent)
    return jax.tree.map(lambda c, r: grid(c + r), mixed, residual), jax.tree.map(grid, residual)


def matrices(layout):
    shares = layout.weight.reshape(-1)
    hub = np.repeat(np.arange(layout.hubs), layout.workers_per_hub)
    hub_share = shares / layout.hub_weight[hub]
    mean = np.repeat(shares[:, None], layout.workers, axis=1)
    in_hubs = (hub[:, None] == hub[None]) * hub_share[:, None]
    return {"mean": (mixing.mean(), mean), "hub_mean": (mixing.hub_mean(), in_hubs)}


def assert_close(one, other):
    np.testing.assert_allclose(one, other, atol=2e-6)


def assert_same_mean(one, other):
    average = lambda x: np.einsum("dn,dn...->...", LAYOUT.weight, x)
    np.testing.assert_allclose(average(one), average(other), atol=2e-6)


@pytest.mark.parametrize(
    ("spec", "mixer", "mesh"),
    [
        *((spec, mixer, (2, 2)) for spec in SPECS for mixer in ("mean", "hub_mean")),
        *((spec, "mean", (1, 1)) for spec in ("grbs:3", "top_k:3+qsgd:4", "powersgd:2")),
        ("sign", "hub_mean", (1, 1)),
    ],
    ids=str,
)
def test_partial_sync_is_its_equation(spec, mixer, mesh):
    mix, matrix = matrices(LAYOUT)[mixer]
    tree = trees()
    new, residual, common = synced(mix, spec, tree, LAYOUT, mesh)
    if compression.parse(spec).second is None:
        jax.tree.map(assert_close, (new, residual), by_the_equation(matrix, spec))
    jax.tree.map(assert_same_mean, new, tree)
    for leaf in jax.tree.leaves(common):  # the same on all devices, to the bit
        first = leaf[:1, :1] if mixer == "mean" else leaf[:, :1]
        assert (leaf == first).all()


def test_over_any_graph_what_can_be_averaged():
    layout = Layout(5, 1, weights=np.arange(1, 6))
    matrix = mixing_matrix(hub_graph("path", 5), layout.hub_weight)
    new, _, _ = synced(mixing.from_matrix(matrix), "grbs:3", trees(layout), layout, (5, 1))
    expected, _ = by_the_equation(matrix, "grbs:3", layout)
    jax.tree.map(assert_close, new, expected)


# 41 values: a third of 30, a third of 10 and the scalar are sent.
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("grbs:3", {("all-reduce", "float32"): 4 * (10 + 4 + 1)}),
        ("random_k:3", {("all-reduce", "float32"): 4 * (10 + 4 + 1)}),
        ("zero", {}),
        # Each of 8 workers sends its values, their indices in bytes, and its weight.
        (
            "top_k:3",
            {
                ("all-gather", "float32"): 4 * 8 * (10 + 4 + 1 + 1),
                ("all-gather", "uint8"): 8 * (10 + 4),
            },
        ),
        # Each sends the signs of 30 and of 10 values in bits, their scales, the scalar, its weight.
        (
            "sign",
            {
                ("all-gather", "uint8"): 8 * (4 + 2),
                ("all-gather", "float32"): 4 * 8 * (1 + 1 + 1 + 1),
            },
        ),
    ],
)
def test_only_the_payload_crosses_the_wire(spec, expected):
    layout = Layout(1, 8)
    program = compiled(mixing.mean(), compression.parse(spec), layout, (1, 8))
    text = program.lower(trees(layout), layout.context()).compile().as_text()
    found = by_kind(one.collective() for one in audit(text, make_mesh(layout)))
    assert found == {(kind, ("workers",), dtype): n for (kind, dtype), n in expected.items()}


@pytest.mark.parametrize("spec", ["top_k:3", "sign", "powersgd:2", "grbs:3"])
def test_empty_tensors_and_none_at_all(spec):
    tree = {"empty": jnp.zeros((2, 4, 0, 5)), "w": trees()["kernel"]}
    new, _, _ = synced(mixing.mean(), spec, tree, LAYOUT, (1, 1))
    assert new["empty"].shape == (2, 4, 0, 5) and np.isfinite(new["w"]).all()
    assert synced(mixing.mean(), spec, {}, LAYOUT, (1, 1))[0] == {}
