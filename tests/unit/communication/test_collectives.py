"""The collectives that every method lists are those that its compiled rounds send: kinds, axes,
types, bytes, and where in the program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh
from jaxlocal.communication.accounting import by_kind
from jaxlocal.communication.audit import Audited, audit
from jaxlocal.compression import parse
from jaxlocal.models.cnn import mll_cnn
from jaxlocal.models.simple import mlp
from jaxlocal.models.supervised import training_loss
from jaxlocal.models.transformers import transformer
from jaxlocal.types import Method

BATCH, TOKENS, CLASSES, INNER = 2, 6, 10, 4  # INNER: inner stages of a round, in one program
FAST = {"xla_backend_optimization_level": 0}  # of the machine code, which is not audited
PARTS = ["mlp", "cnn", "transformer"]
# Scalars that a method sends and does not list: the loss, which the optimizer is given.
SCALARS = dict.fromkeys(["data_parallel", "data_parallel-average", "data_parallel-qsgd"], 4)


@functools.cache
def model(name):
    """A model, its loss, and the shapes of one worker's batch."""
    image, size = jax.ShapeDtypeStruct((BATCH, 8, 8, 1), np.float32), (BATCH,)
    if name == "transformer":
        made = transformer((TOKENS,), CLASSES, layers=1, width=16, heads=2)
        image, size = jax.ShapeDtypeStruct((BATCH, TOKENS), np.int32), (BATCH, TOKENS)
    else:
        made = {"mlp": mlp, "cnn": mll_cnn}[name]((8, 8, 1), CLASSES)
    grad_fn = jaxlocal.gradients(training_loss(made, lambda x: x, CLASSES), stateful=True)
    return made, grad_fn, {"inputs": image, "targets": jax.ShapeDtypeStruct(size, np.int32)}


def audited(method: Method, layout: Layout, name: str, mesh_shape=None):
    """Bytes that a method lists and bytes that its round sends, by kind, axes and type; and each
    collective that the round sends."""
    made, _, batch = model(name)
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=mesh_shape))
    steps = INNER * method.inner.steps + method.outer.steps
    state = round_fn.shapes(*jax.eval_shape(made.init, jax.random.key(0)))
    lead = lambda x: jax.ShapeDtypeStruct((steps, *layout.shape, *x.shape), x.dtype)
    programs = round_fn.lower(state, jax.tree.map(lead, batch))
    assert [times for times, _ in programs] == [1] * len(programs)
    found = [one for _, program in programs for one in audit(program.compile(FAST), round_fn.mesh)]
    # The end of a round that takes turns has all of them in its program, each as a branch.
    listed = round_fn.collectives(state, steps) + [
        one
        for turn in range(1, method.outer.turns)
        for one in round_fn.collectives(state, method.outer.steps, turn)
    ]
    return by_kind(listed), by_kind(x.collective() for x in found), found


def assert_sends_what_it_lists(listed: dict, sent: dict, scalars: int = 0):
    """To the byte, except for the bytes of `SCALARS`."""
    assert {key: sent.get(key, 0) - listed.get(key, 0) for key in {*sent, *listed}} == {
        key: scalars * (key[0] == "all-reduce") for key in {*sent, *listed}
    }


def assert_in_its_stage(found: list[Audited], method: Method):
    """Once in every inner stage that communicates and once at the end of a round, but never in the
    loop over a worker's steps or in the loop over workers."""
    communicates = bool(method.inner.communication(SHAPES))
    assert {one.loops for one in found} <= ({(INNER,), ()} if communicates else {()})
    assert all(one.branches == int(method.outer.turns > 1) for one in found)


class _AnyState:
    """A state of one parameter, enough to ask a stage whether it communicates."""

    params = opt_state = model_state = {"x": jax.ShapeDtypeStruct((1, 1, 8, 8), jnp.float32)}


SHAPES = _AnyState()
# The first entry of each method runs on all models; the others differ in options alone.
NAMED = list({name.split("-")[0]: name for name in reversed(registry.METHODS)}.values())
QUICK = "local_sgd"  # the quick tier runs it on all models
CASES = [(name, "mlp") for name in registry.METHODS] + [
    pytest.param(name, part, marks=[] if name == QUICK else [pytest.mark.slow])
    for name in sorted(NAMED)
    for part in PARTS[1:]
]


@pytest.mark.parametrize(("name", "part"), CASES)
def test_a_round_sends_what_its_method_lists(name, part):
    entry = registry.METHODS[name]
    method = entry.build(model(part)[1], registry.OPTIMIZERS["momentum"])
    listed, sent, found = audited(method, entry.layout, part)
    assert_sends_what_it_lists(listed, sent, SCALARS.get(name, 0) * INNER)
    assert_in_its_stage(found, method)
    assert sent


GRID = Layout(4, 4)


def methods_on_hubs():
    grad_fn, sgd = model("mlp")[1], optax.sgd(0.1)
    top, blocks, factors = map(parse, ("top_k:4", "grbs:8", "powersgd:2"))
    of = lambda graph: registry.matrix(graph, GRID)
    return {
        "local_sgd": jaxlocal.local_sgd(grad_fn, sgd, period=INNER),
        "ring": jaxlocal.mll_sgd(grad_fn, sgd, matrix=of("ring"), local_steps=2, hub_period=4),
        "star, top-k": jaxlocal.mll_sgd(
            grad_fn,
            sgd,
            matrix=of("star"),
            local_steps=2,
            hub_period=4,
            compressor=parse("top_k:4"),
        ),
        "cser": jaxlocal.cser(
            grad_fn, sgd, gradient_compressor=blocks, reset_compressor=factors, period=INNER
        ),
    }


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, marks=[pytest.mark.slow] * (name == "cser" and shape != (2, 2)))
        for name in ("local_sgd", "ring", "star, top-k", "cser")
        for shape in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 2))
    ],
)
def test_a_round_sends_what_its_method_lists_on_any_mesh(name, shape):
    method = methods_on_hubs()[name]
    listed, sent, found = audited(method, GRID, "mlp", shape)
    assert_sends_what_it_lists(listed, sent)
    assert bool(sent) == (max(shape) > 1)
    axes = {axis for one in found for axis in one.axes}
    assert axes <= {axis for axis, n in zip(("hubs", "workers"), shape, strict=True) if n > 1}


@pytest.mark.parametrize(
    ("dtype", "spec", "expected"),
    [
        # Averages of half precision are float32; 8 workers' payloads of 64 values, their weights.
        ("bfloat16", "identity", {("all-reduce", "float32"): 4 * 64}),
        ("float32", "bfloat16", {("all-gather", "uint16"): 2 * 512, ("all-gather", "float32"): 32}),
    ],
)
def test_half_precision_is_sent_as_listed_before_and_after_xla_optimises(dtype, spec, expected):
    grad_fn = jaxlocal.gradients(lambda w, batch, key: jnp.square(w - batch).sum())
    method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.1), period=2)
    if spec != "identity":
        method = jaxlocal.qsparse_local_sgd(
            grad_fn, optax.sgd(0.1), compressor=parse(spec), period=2
        )
    round_fn = RoundFn(method, Layout(1, 8))
    state = round_fn.shapes(jax.ShapeDtypeStruct((8, 8), jnp.dtype(dtype)))
    *_, (_, end) = round_fn.lower(state, jax.ShapeDtypeStruct((2, 1, 8, 8, 8), jnp.dtype(dtype)))
    for program in (end.as_text("hlo"), end.compile(FAST)):
        sent = by_kind(one.collective() for one in audit(program, round_fn.mesh))
        assert sent == {(kind, ("workers",), type_): n for (kind, type_), n in expected.items()}
    assert sent == by_kind(round_fn.collectives(state, 2))
