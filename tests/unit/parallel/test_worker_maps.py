"""Every worker map gives the same results; only time and memory differ."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from exactly import assert_same
from jax import lax

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh
from jaxlocal.compression import top_k
from jaxlocal.parallel.layout import STACKED
from jaxlocal.parallel.worker_maps import block_size, over_workers
from jaxlocal.training.pieces import Piece

MODES = ("vmap", "map", "blocks:1", "blocks:2", "blocks:3", "blocks:8", "blocks:100")


def worker_step(params, state, batch, rate):
    """A step whose results are exact in any mode: sums and doublings."""
    moved = {"w": params["w"] + 2 * batch, "half": 2 * params["half"]}
    return moved, (state[0] + 1, jax.random.fold_in(state[1], 3)), batch - params["w"]


def visible(results):
    params, (count, key), change = results
    return params, (count, jax.random.key_data(key)), change


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_results(mode, shape):
    """With eight workers on a device and with one, and with results that replace arguments."""
    layout = Layout(2, 4)
    w, batch = np.random.default_rng(0).normal(size=(2, 2, 4, 3)).astype(np.float32)
    params = {"w": w, "half": w.astype(jnp.bfloat16)}
    keys = jax.random.split(jax.random.key(0), layout.shape)
    trees = params, (np.zeros(layout.shape, np.int32), keys), batch, None

    def every_in_place(*trees):
        return [visible(over_workers(worker_step, mode, n)(*trees)) for n in (0, 1, 2)]

    mesh = make_mesh(layout, shape=shape)
    mapped = jax.shard_map(every_in_place, mesh=mesh, in_specs=STACKED, out_specs=STACKED)
    folded = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, 3)))(keys)
    ones, moved = np.ones(layout.shape, np.int32), {"w": w + 2 * batch, "half": 2 * params["half"]}
    for results in jax.jit(mapped)(*trees):
        assert_same(results, visible((moved, (ones, folded), batch - w)))


@pytest.mark.parametrize("mode", ["blocks:", "blocks", "vmpa"])
def test_unknown_modes_are_refused(mode):
    sentence = f"unknown worker map {mode!r}; did you mean .* known: vmap, map, blocks:N"
    for refuses in (block_size, lambda mode: over_workers(jnp.sin, mode)):
        with pytest.raises(ConfigurationError, match=sentence):
            refuses(mode)


@pytest.mark.parametrize("mode", ["blocks:0", "blocks:-1", "blocks:x", "blocks:" + 5000 * "9"])
def test_blocks_have_one_worker_or_more(mode):
    with pytest.raises(ConfigurationError, match="takes a number of workers from 1 on, got 'blo"):
        block_size(mode)


@pytest.mark.parametrize("mode", ["map", "vmap", "blocks:2"])
@pytest.mark.parametrize("wrong", [lambda x: x[:2], lambda x: x[None], lambda x: x > 0])
def test_a_result_that_replaces_an_argument_has_its_shape_and_dtype(mode, wrong):
    sentence = r"given \('float32\[3\]',\) and gives back \('(float32\[2|float32\[1, 3|bool\[3)\]"
    with pytest.raises(ConfigurationError, match=sentence):
        over_workers(lambda x: (wrong(x),), mode, in_place=1)(jnp.ones((1, 4, 3)))


@pytest.mark.optimized
def test_a_loop_that_writes_its_results_in_place_needs_less_memory():
    """Local steps hold no second copy of all models."""
    params, batch = jnp.ones((1, 16, 4096)), jnp.ones((1, 16))

    def temporary(in_place):
        step = over_workers(lambda x, b: (jnp.sin(x) * b, x.max()), "map", in_place)
        steps = lambda x, b: lax.fori_loop(0, 3, lambda _, x: step(x, b)[0], x)
        program = jax.jit(steps, donate_argnums=0).lower(params, batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(in_place=1) < params.nbytes / 4
    assert temporary(in_place=0) >= params.nbytes


@pytest.mark.parametrize("rates", [1.0, 0.6])
def test_local_sgd_in_blocks_equals_local_sgd_in_turn(rates):
    layout = Layout(1, 5, rates=rates)
    batches = problems.make_batches(layout, 4)

    def run(mode):
        method = jaxlocal.local_sgd(problems.grad_fn, optax.adam(0.1), period=4, worker_map=mode)
        round_fn = problems.on_one_device(method, layout)
        state, info = round_fn(round_fn.init(problems.START, jax.random.key(0)), batches)
        return problems.vectors(state.params), np.asarray(info.worker["active"])

    (blocks, active), (in_turn, expected) = run("blocks:2"), run("map")
    # Some rounding at 6e-8 in each of four steps.
    np.testing.assert_allclose(blocks, in_turn, rtol=1e-5)
    np.testing.assert_array_equal(active, expected)
    assert (active.mean() == 1) == (rates == 1)


METHODS = {
    "local_sgd": jaxlocal.local_sgd,
    "data_parallel": jaxlocal.data_parallel,
    "cser": partial(jaxlocal.cser, gradient_compressor=top_k(2), reset_compressor=top_k(2)),
}


def primitives(jaxpr, in_conds=False):
    """(name, whether it is inside a cond) of every primitive, at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, in_conds
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(sub):
                inside = in_conds or eqn.primitive.name == "cond"
                yield from primitives(getattr(sub, "jaxpr", sub), inside)


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.mark.parametrize("workers", [8, 16])
@pytest.mark.parametrize("mode", ["map", "blocks:1", "vmap"])
@pytest.mark.parametrize("method", METHODS)
def test_a_worker_that_skips_its_step_in_a_loop_takes_no_gradient(method, mode, workers):
    """The gradient of a sine, a cosine, is inside a cond, and the collectives are not; with one
    worker on a device too."""
    grad_fn = jaxlocal.gradients(lambda params, batch, key: jnp.sin(params @ batch))
    layout = Layout(1, workers, rates=0.5)
    round_fn = RoundFn(METHODS[method](grad_fn, optax.sgd(0.1), worker_map=mode), layout)
    state = round_fn.init(jnp.ones(2), jax.random.key(0))
    batches = jnp.ones((1, *layout.shape, 2))
    traced = jax.make_jaxpr(round_fn._programs.get(Piece(1, False), state))(
        state, batches, round_fn.context
    )
    found = set(primitives(traced.jaxpr))
    assert {inside for name, inside in found if name == "cos"} == {mode != "vmap"}
    sent = {inside for name, inside in found if name.startswith(("psum", "all_gather"))}
    assert sent <= {False} and (sent or method == "local_sgd")
