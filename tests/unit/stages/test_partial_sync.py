"""Partial synchronisation against its equation, worker by worker, and the messages it sends."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import jaxlocal
from jaxlocal import ConfigurationError, Layout, compression, make_mesh
from jaxlocal.communication import mixing
from jaxlocal.communication.accounting import by_kind
from jaxlocal.communication.audit import audit
from jaxlocal.communication.topology import hub_graph, mixing_matrix
from jaxlocal.parallel.collectives import broadcast_to_workers
from jaxlocal.parallel.layout import CONTEXT, STACKED
from jaxlocal.stages.error_feedback import error_feedback
from jaxlocal.stages.error_reset import error_reset, partial_average
from jaxlocal.stages.partial_sync import partial_sync
from jaxlocal.stages.synced_updates import synced_updates
from jaxlocal.types import MessageBits

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


def test_messages_are_the_payload():
    params = {"kernel": jnp.zeros((40, 50)), "bias": jnp.zeros(50)}
    optimizer, layout = optax.sgd(0.1), Layout(1, 4)
    top, blocks = compression.top_k(10), compression.grbs(20)
    top_bits = (200 + 5) * 32 + 200 * 16 + 5 * 8
    block_bits = (100 + 3) * 32
    grad_fn = problems.grad_fn
    for method, inner, outer in [
        (
            jaxlocal.cser(
                grad_fn, optimizer, gradient_compressor=blocks, reset_compressor=top, period=4
            ),
            block_bits,
            top_bits,
        ),
        (
            jaxlocal.cser(
                grad_fn,
                optimizer,
                gradient_compressor=blocks,
                reset_compressor=blocks,
                period=4,
                implementation=2,
            ),
            block_bits,
            block_bits,
        ),
        (jaxlocal.qsparse_local_sgd(grad_fn, optimizer, compressor=top, period=4), 0, top_bits),
        (jaxlocal.csea(grad_fn, optimizer, reset_compressor=blocks), 0, block_bits),
        (jaxlocal.data_parallel(grad_fn, optimizer, compressor=blocks), block_bits, 0),
    ]:
        round_fn = problems.on_one_device(method, layout)
        expected = (MessageBits(inner), MessageBits(outer))
        assert round_fn.stage_bits(round_fn.shapes(params)) == expected
        alone = problems.on_one_device(method, Layout(1, 1))
        assert alone.stage_bits(alone.shapes(params)) == (MessageBits(), MessageBits())


def test_a_hub_sends_all_payloads_that_cannot_be_averaged():
    params, layout = {"w": jnp.zeros(256)}, Layout(3, 4)
    for spec, payloads in (("grbs:4", 1), ("top_k:4", 4)):
        compressor = compression.parse(spec)
        method = jaxlocal.qsparse_local_sgd(
            problems.grad_fn, optax.sgd(0.1), compressor=compressor, period=2
        )
        round_fn = problems.on_one_device(method, layout)
        bits = compression.payload_bits(compressor, params)
        outer = round_fn.stage_bits(round_fn.shapes(params))[1]
        assert outer == MessageBits(workers=bits, hubs=2 * payloads * bits)


@pytest.mark.parametrize("spec", ["top_k:3", "sign", "powersgd:2", "grbs:3"])
def test_empty_tensors_and_none_at_all(spec):
    tree = {"empty": jnp.zeros((2, 4, 0, 5)), "w": trees()["kernel"]}
    new, _, _ = synced(mixing.mean(), spec, tree, LAYOUT, (1, 1))
    assert new["empty"].shape == (2, 4, 0, 5) and np.isfinite(new["w"]).all()
    assert synced(mixing.mean(), spec, {}, LAYOUT, (1, 1))[0] == {}


def test_errors_of_half_precision_are_sent_as_float32():
    method = jaxlocal.qsparse_local_sgd(
        problems.grad_fn, optax.sgd(0.1), compressor=compression.grbs(4), period=2
    )
    round_fn = problems.on_one_device(method, Layout(1, 2))
    shapes = round_fn.shapes({"w": jnp.zeros(40, jnp.bfloat16)})
    assert round_fn.stage_bits(shapes)[1].workers == 32 * 10


RING = mixing_matrix(hub_graph("ring", 4), np.full(4, 0.25))
OWN_PLACES = compression.top_k(2)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: error_reset(mixing.hub_mean(), compression.grbs(2)), "error reset.*all workers"),
        (
            lambda: synced_updates(
                problems.grad_fn, optax.sgd(0.1), mixing.hub_mean(), compression.grbs(2)
            ),
            "updates.*all workers",
        ),
        (
            lambda: error_feedback(mixing.hub_mean(), compression.grbs(2)),
            "error feedback from an anchor.*all workers",
        ),
        (
            lambda: partial_average(mixing.hub_diffusion(RING), OWN_PLACES),
            "top_k:2.*gathers none",
        ),
        (
            lambda: partial_average(mixing.from_matrix(RING), compression.powersgd(1)),
            "powersgd:1.*workers of a hub common",
        ),
        (
            lambda: jaxlocal.cser(
                problems.grad_fn,
                optax.sgd(0.1),
                gradient_compressor=OWN_PLACES,
                reset_compressor=compression.grbs(2),
                period=2,
                implementation=2,
            ),
            "implementation 2.*top_k:2 keeps differs",
        ),
        (
            lambda: jaxlocal.cser(
                problems.grad_fn,
                optax.sgd(0.1),
                gradient_compressor=OWN_PLACES,
                reset_compressor=compression.grbs(2),
                period=2,
                implementation=3,
            ),
            "implementations 1 and 2, got 3",
        ),
        (
            lambda: jaxlocal.sparse_loco(problems.grad_fn, optax.sgd(0.1), error_decay=1.5),
            r"decay of errors must be in \[0, 1\], got 1.5",
        ),
        (
            lambda: jaxlocal.local_sgd(
                problems.grad_fn, optax.sgd(0.1), compressor=compression.grbs(2)
            ),
            "unknown argument of local_sgd 'compressor'",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_when_it_is_built(build, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        build()


def test_an_error_reset_needs_whole_precision():
    method = jaxlocal.cser_pl(
        problems.grad_fn, optax.sgd(0.1), reset_compressor=compression.grbs(2), period=2
    )
    round_fn = problems.on_one_device(method, Layout(1, 2))
    with pytest.raises(ConfigurationError, match="bfloat16 is too coarse"):
        round_fn.init({"w": jnp.zeros(8, jnp.bfloat16)}, jax.random.key(0))


def test_a_ratio_above_every_tensor_is_an_error_when_the_state_is_made():
    method = jaxlocal.ef_sgd(problems.grad_fn, optax.sgd(0.1), compressor=compression.grbs(50))
    round_fn = problems.on_one_device(method, Layout(1, 2))
    with pytest.raises(ConfigurationError, match="50.*40"):
        round_fn.init({"w": jnp.zeros(40)}, jax.random.key(0))


def test_a_biased_compressor_without_feedback_raises_a_warning():
    arguments, sign = (problems.grad_fn, optax.sgd(0.1)), compression.sign()
    with pytest.warns(UserWarning, match="sign is biased, and without error feedback"):
        jaxlocal.data_parallel(*arguments, compressor=sign)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxlocal.data_parallel(*arguments, compressor=compression.qsgd(4))
        jaxlocal.ef_sgd(*arguments, compressor=sign)
        jaxlocal.cser(*arguments, gradient_compressor=sign, reset_compressor=sign, period=4)
