"""The compiled round: how many programs a run takes, how a round is cut, and which batches fit."""

import compilations
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, periods
from jaxlocal.communication import mixing
from jaxlocal.parallel.pool import check_indices
from jaxlocal.stages.compose import in_turn, repeat, sequence
from jaxlocal.stages.local_step import local_step
from jaxlocal.stages.sync import sync
from jaxlocal.training import Reestimation
from jaxlocal.training.checks import steps_of
from jaxlocal.training.pieces import Piece
from jaxlocal.types import Method

grad_fn = jaxlocal.gradients(lambda w, batch, key: jnp.square(jnp.tanh(w) - batch).mean())


def local_sgd(steps_of_inner: int = 1, optimizer=None, period=None) -> Method:
    """Local SGD with an inner stage of some steps."""
    optimizer = optimizer or optax.sgd(0.1)
    inner = repeat(local_step(grad_fn, optimizer), steps_of_inner)
    period = period or periods.constant(steps_of_inner)
    return Method(inner, sync(mixing.mean()), optimizer, period)


def one_device(method: Method, layout: Layout, **options) -> RoundFn:
    mesh = jaxlocal.make_mesh(layout, jax.devices()[:1])
    return RoundFn(method, layout, mesh, **options)


@pytest.mark.parametrize(
    ("rule", "total_steps", "distinct"),
    [
        (
            periods.qsr(optax.cosine_decay_schedule(0.1, 400), coefficient=0.2, base=1),
            400,
            14,
        ),
        (periods.constant(1), 3, 1),
        (periods.constant(7), 30, 2),  # 7, 7, 7, 7, 2
        (periods.constant(63), 100, 2),
        (periods.constant(100), 64, 1),
        (periods.post_local(3, 6), 20, 3),
        (periods.swap(2), 25, 2),
    ],
    ids=lambda value: getattr(value, "description", None),
)
def test_a_run_compiles_constant_rounds_whole_and_others_in_powers_of_four(
    rule, total_steps, distinct
):
    lengths = list(periods.lengths(rule, total_steps))
    assert sum(lengths) == total_steps and len(set(lengths)) == distinct
    layout = Layout(workers_per_hub=2)
    round_fn = one_device(local_sgd(period=rule), layout)
    state = round_fn.init(jnp.zeros(2), jax.random.key(0))
    with compilations.counted() as compiled:
        for length in lengths:
            batches = np.ones((length, *layout.shape, 2), np.float32)
            state, _ = round_fn(state, batches, length=length)
    assert int(state.step) == total_steps
    whole = {lengths[0]} if rule.constant and rule.length(0, 10**6) == lengths[0] else set()
    cut = set(lengths) - whole
    powers = {4**k for length in cut for k, digit in enumerate(_base_4(length)) if digit}
    assert len(compiled) == len(whole) + len(powers) + bool(cut)  # cut rounds share their end


def _base_4(number):
    """The digits of a number, the last one first."""
    while number:
        yield number % 4
        number //= 4


def test_on_hubs_the_programs_are_counted_in_hub_averages():
    layout = Layout(2, 2)
    method = jaxlocal.mll_sgd(
        grad_fn, optax.sgd(0.1), matrix=np.full((2, 2), 0.5), local_steps=3, hub_period=7
    )
    round_fn = RoundFn(method, layout)
    state = round_fn.init(jnp.zeros(2), jax.random.key(0))
    with compilations.counted() as compiled:
        for length in (21, 21, 9):  # 7 hub averages at once, then 1 + 1 + 1
            batches = np.ones((length, *layout.shape, 2), np.float32)
            state, _ = round_fn(state, batches, length=length)
    assert len(compiled) == 3


@settings(deadline=None)
@given(times=st.integers(1, 5000), inner=st.integers(1, 7), max_chunk=st.integers(1, 2000))
def test_chunks_sum_to_the_round_descend_and_are_capped(times, inner, max_chunk):
    round_fn = one_device(local_sgd(inner), Layout(), max_chunk=max_chunk)
    chunks = list(round_fn.chunks(times * inner))
    assert sum(chunks) == times * inner
    assert chunks == sorted(chunks, reverse=True)
    assert all(chunk % inner == 0 for chunk in chunks)
    assert max(chunks) <= max(max_chunk, inner)
    powers = [chunk // inner for chunk in chunks]
    assert set(powers) <= {4**n for n in range(8)}
    # As few as powers of four allow: none but the largest comes more than three times.
    assert all(powers.count(size) <= 3 for size in set(powers[1:]) - {powers[0]})
    assert 4 * powers[0] > min(times, max_chunk // inner)


@pytest.mark.optimized
@pytest.mark.parametrize("max_chunk", [1, 4])
def test_however_a_round_is_cut_the_bits_and_the_report_are_the_same(max_chunk):
    layout = Layout(workers_per_hub=8, rates=0.7)
    batches = np.random.default_rng(0).normal(size=(16, *layout.shape, 3)).astype(np.float32)

    def run(most):
        round_fn = RoundFn(local_sgd(1, optax.adam(0.1)), layout, max_chunk=most)
        state = round_fn.init(jnp.ones(3), jax.random.key(0))
        state, info = round_fn(state, batches, length=16)
        return jax.tree.map(np.asarray, (state.params, state.opt_state, info))

    whole, cut = run(16), run(max_chunk)
    assert whole[2].worker["loss"].shape == (16, *layout.shape)
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 2, 3), r"2 hubs, 4 workers.*\(4, 2, 3\)"),
        ((4, 8), r"2 hubs, 4 workers.*\(4, 8\)"),
        ((3, 2, 4), "round of 3 steps is not a positive multiple of the 2 "),
        ((0, 2, 4), "round of 0 steps is not a positive multiple of the 2 "),
    ],
    ids=str,
)
def test_batches_of_a_wrong_leading_shape_are_refused_with_both_values(shape, message):
    method = jaxlocal.mll_sgd(
        grad_fn, optax.sgd(0.1), matrix=np.full((2, 2), 0.5), local_steps=2, hub_period=1
    )
    round_fn = RoundFn(method, Layout(2, 4))
    state = round_fn.init(jnp.zeros(()), jax.random.key(0))
    with pytest.raises(ConfigurationError, match=message):
        round_fn(state, np.ones(shape, np.float32))
    assert not state.params.is_deleted()  # a refused round does not consume the state


def test_leaves_of_different_leading_shapes_are_refused_with_both():
    round_fn = RoundFn(local_sgd(), Layout())
    state = round_fn.init(jnp.zeros(()), jax.random.key(0))
    with pytest.raises(ConfigurationError, match=r"\(2, 1, 1\), \(3, 1, 1\)"):
        round_fn(state, {"x": np.ones((2, 1, 1)), "y": np.ones((3, 1, 1))})


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({"x": np.ones((2, 1, 1)), "y": np.ones((3, 1, 1))}, "in x, y"),
        ({"x": np.ones((2, 1, 1)), "y": np.float32(1)}, r"\(\), \(2, 1, 1\) in y, x; make arrays"),
        (np.float32(1), r"got leading shapes \(\); make arrays of lists and numbers"),
        (float("nan"), r"got leading shapes \(\); make arrays"),
        ([[[1.0]], [[2.0]]], r"got leading shapes \(\) in 0/0/0; make arrays"),
        ({}, "got no array"),
        ((), "got no array"),
        (None, "got no array"),
        (np.array([[["a"]]]), "arrays of numbers, got one of <U1"),
        (np.array([[[None]]]), "arrays of numbers, got one of object"),
    ],
    ids=str,
)
def test_batches_that_are_not_arrays_of_numbers_are_refused(batches, message):
    with pytest.raises(ConfigurationError, match=message):
        steps_of(batches, local_sgd(), Layout())


def test_a_raw_key_is_refused():
    with pytest.raises(ConfigurationError, match=r"a key from jax.random.key\(seed\), got \w+"):
        RoundFn(local_sgd(), Layout()).init(jnp.zeros(()), jax.random.PRNGKey(0))


def test_a_mixer_that_does_not_fit_the_layout_is_refused_before_anything_is_allocated():
    method = jaxlocal.cooperative_sgd(
        grad_fn, optax.sgd(0.1), matrix=np.full((3, 3), 1 / 3), period=1
    )
    with pytest.raises(ConfigurationError, match="3 hubs does not fit 4 hubs"):
        RoundFn(method, Layout(hubs=4)).init(jnp.zeros(()), jax.random.key(0))


POOL = {
    "image": np.random.default_rng(1).integers(0, 256, (50, 6)).astype(np.uint8),
    "target": np.random.default_rng(2).integers(0, 3, 50).astype(np.int32),
}


def classify(params, batch, key):
    logits = batch["image"].astype(jnp.float32) / 255 @ params
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"]).mean()


@pytest.mark.optimized
@pytest.mark.parametrize("layout", [Layout(workers_per_hub=8), Layout(2, 3)], ids=lambda x: x.shape)
def test_indices_into_a_pool_give_the_bits_that_the_examples_give(layout):
    method = jaxlocal.local_sgd(jaxlocal.gradients(classify), optax.adam(0.1), period=4)
    indices = np.random.default_rng(3).integers(0, 50, (2, 4, *layout.shape, 5))
    ends = []
    for pool in (POOL, ()):
        round_fn = RoundFn(method, layout, data=pool)
        state = round_fn.init(jnp.zeros((6, 3)), jax.random.key(0))
        for index in indices.astype(np.int32):
            batches = index if pool else jax.tree.map(lambda x, at=index: x[at], POOL)
            state, info = round_fn(state, batches)
        ends.append(jax.tree.map(np.asarray, (state.params, state.opt_state, info)))
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_a_pool_and_its_indices_are_checked():
    layout = Layout(1, 2)
    grad_fn = jaxlocal.gradients(lambda w, batch, key: (w * batch["x"]).mean())
    method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.1))
    with pytest.raises(ConfigurationError, match=r"same number of examples, got \[5, 10\]"):
        RoundFn(method, layout, data={"x": np.arange(10.0), "y": np.arange(5.0)})
    round_fn = RoundFn(method, layout, data={"x": np.arange(5.0)})
    state = round_fn.init(jnp.float32(1), jax.random.key(0))
    both = np.array([[[[0, 1, 2], [3, 4, 5]]]])
    over_workers = NamedSharding(round_fn.mesh, P(None, None, "workers"))
    everywhere = NamedSharding(round_fn.mesh, P())
    for wrong, message in [
        (np.full((1, 1, 2, 3), 5), "from 5 to 5 do not fit a pool of 5"),
        (np.full((1, 1, 2, 3), -1), "from -1 to -1"),
        (np.ones((1, 1, 2, 3)), "integer indices.*float64"),
        ({"rows": np.ones((1, 1, 2, 3), int)}, '"index"'),
        (both.astype(np.uint64), "from 0 to 5 do not fit"),
        (both + 2**32, "from 4294967296 to 4294967301 do not fit"),
        (jnp.asarray(both), "from 0 to 5 do not fit"),
        (jnp.asarray(both - 1, jnp.int8), "from -1 to 4 do not fit"),
        (jnp.asarray(both, jnp.uint32), "from 0 to 5 do not fit"),
        (jax.device_put(both, over_workers), "from 0 to 5 do not fit"),
        (jax.device_put(both, everywhere), "from 0 to 5 do not fit"),
        ({"index": jnp.asarray(both), "noise": both}, "from 0 to 5 do not fit"),
        (both[..., :0] > 0, "integer indices.*bool"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            round_fn(state, wrong)
    check_indices(both[..., :0], examples=5)
    check_indices(jnp.asarray(both)[..., :0], examples=5)
    jax.eval_shape(round_fn, state, jnp.asarray(both))  # inside jit values are not known
    with pytest.raises(ConfigurationError, match="from 0 to 5 do not fit"):
        Reestimation(round_fn, lambda params, model_state, batch: model_state, both)
    more = {"index": np.full((1, 1, 2, 3), 4), "noise": np.zeros((1, 1, 2, 3))}
    state, info = round_fn(state, more)
    assert (np.asarray(info.worker["loss"]) == 4).all()


@pytest.mark.optimized
def test_a_pool_of_bytes_stays_bytes_on_every_device():
    layout = Layout(workers_per_hub=8)
    method = jaxlocal.local_sgd(jaxlocal.gradients(classify), optax.adam(0.1), period=4)
    round_fn = RoundFn(method, layout, data=POOL)
    image = round_fn.context.data["image"]
    assert image.dtype == np.uint8 and image.is_fully_replicated
    assert len(image.addressable_shards) == 8
    state = round_fn.init(jnp.zeros((6, 3)), jax.random.key(0))
    index = np.zeros((4, *layout.shape, 5), np.int32)
    program = round_fn._programs.lower(Piece(4, False), state, index, 4).compile().as_text()
    assert "u8[50,6]" in program and "f32[50,6]" not in program


def test_the_mean_of_the_workers_is_weighted_in_parameters_and_model_state():
    def loss(params, model_state, batch, key):
        return (params * batch).sum(), ({"sum": model_state["sum"] + batch}, {})

    layout = Layout(2, 4, weights=np.arange(1, 9))
    method = jaxlocal.local_sgd(jaxlocal.gradients(loss, stateful=True), optax.sgd(1.0), period=2)
    round_fn = RoundFn(method, layout)
    state = round_fn.init(jnp.zeros(3), jax.random.key(0), {"sum": jnp.zeros(3)})
    batches = np.random.default_rng(0).normal(size=(2, 2, 4, 3)).astype(np.float32)
    state, _ = round_fn.local_steps(state, batches)
    params, model_state = round_fn.mean(state)
    expected = np.tensordot(np.arange(1, 9) / 36, batches.sum(0).reshape(8, 3), 1)
    # A sum of sixteen float32 terms of size one
    np.testing.assert_allclose(params, -expected, atol=1e-6)
    np.testing.assert_allclose(model_state["sum"], expected, atol=1e-6)


def test_an_inner_stage_that_takes_turns_is_refused_unless_they_are_all_in_it():
    stage = sync(mixing.mean())
    turns = in_turn(stage, stage)
    method = jaxlocal.local_sgd(problems.grad_fn, optax.sgd(0.1), period=2)
    with pytest.raises(ConfigurationError, match="same messages at every.*takes 2 turns"):
        RoundFn(method._replace(inner=sequence(method.inner, turns)), Layout())
    whole = repeat(sequence(method.inner, turns), 2)
    assert RoundFn(method._replace(inner=whole), Layout()).method.inner.turns == 1
