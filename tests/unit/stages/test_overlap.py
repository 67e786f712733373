"""Overlapped synchronisation of fragments: Streaming DiLoCo against a float64 loop, and against
methods that it must coincide with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import reference_streaming
from hypothesis import given
from hypothesis import strategies as st
from jaxprs import jaxprs, kind, reaches

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh, periods
from jaxlocal.communication import mixing
from jaxlocal.stages import compose
from jaxlocal.stages.overlap import fragments_of, overlapped
from jaxlocal.types import Memory

CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64 rounds at 1e-16
START = np.append(problems.START["weight"], problems.START["bias"])
# The model of `problems` in four tensors of one number each.
FOUR = dict(zip("abcd", START, strict=True))
GRID = Layout(2, 4, weights=[1, 2, 3, 4, 4, 3, 2, 1])
SOMETIMES = Layout(1, 4, weights=[1, 2, 3, 4], rates=[0.4, 1, 0.7, 1])
# The coordinates of each fragment, by the number of fragments: equal tensors take turns.
COORDINATES = {
    1: [range(4)],
    2: [(0, 2), (1, 3)],
    3: [(0, 3), (1,), (2,)],
    4: [[n] for n in range(4)],
}


def loss(params, batch, key):
    weight = jnp.stack([params["a"], params["b"], params["c"]])
    return problems.loss({"weight": weight, "bias": params["d"]}, batch, key)


grad_fn = jaxlocal.gradients(loss)


def decaying(now):
    return 0.1 / (1 + 0.05 * now)


def heavy_ball():
    return optax.chain(optax.trace(0.8), jaxlocal.scale_by_step(decaying))


def vectors(params):
    return np.stack([np.asarray(params[name]).reshape(-1) for name in "abcd"], axis=1)


def run(method, lengths, layout=GRID, mesh=(1, 1)):
    """{step: models [K, 4]} after each dispatch, who was active [steps, K], and the last state."""
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=mesh))
    state = round_fn.init(FOUR, jax.random.key(0))
    batches, ending = problems.make_batches(layout, sum(lengths)), method.outer.steps
    models, active, start = {0: vectors(state.params)}, [], 0

    def keep(info):
        if "active" in info.worker:
            active.append(np.asarray(info.worker["active"]).reshape(-1, layout.workers))
        models[int(state.step)] = vectors(state.params)

    for end in np.cumsum(lengths):
        for now in range(start, end - ending):
            state, info = round_fn.local_steps(state, problems.steps_of(batches, now, now + 1))
            keep(info)
        state, info = round_fn.end_round(state, problems.steps_of(batches, end - ending, end))
        keep(info)
        start = end
    return models, np.concatenate(active) > 0, state


@pytest.mark.parametrize(
    ("fragments", "delay", "factor", "layout", "mesh"),
    [
        (1, 0, 0.0, GRID, (1, 1)),
        (1, 3, 0.5, GRID, (2, 4)),
        (2, 1, 0.0, SOMETIMES, (1, 2)),
        (3, 2, 0.5, GRID, (1, 4)),
        (4, 1, 0.3, SOMETIMES, (1, 1)),
        (4, 0, 0.5, GRID, (2, 2)),
    ],
)
def test_streaming_diloco(fragments, delay, factor, layout, mesh):
    rule = periods.split(4 * fragments, fragments)
    lengths = list(periods.lengths(rule, 30))
    outer = optax.sgd(0.7, momentum=0.9, nesterov=True)
    with jax.enable_x64(True):
        method = jaxlocal.streaming_diloco(
            grad_fn,
            heavy_ball(),
            period=4 * fragments,
            outer_optimizer=outer,
            fragments=fragments,
            delay_steps=delay,
            mixing_factor=factor,
        )
        if delay >= 2:  # the last round of two steps joins the one before
            lengths[-2:] = [6]
        models, active, _ = run(method, lengths, layout, mesh)
    gradient = problems.numpy_gradient(problems.make_batches(layout, 30))
    expected = reference_streaming.streaming_diloco(
        gradient, START, decaying, lengths, layout.weight.reshape(-1), 0.8, 0.7, 0.9,
        COORDINATES[fragments], delay, factor, active,
    )  # fmt: skip
    assert active.all() == (layout is GRID) and max(models) == 30
    for now, found in models.items():
        np.testing.assert_allclose(found, expected[now], **CLOSE)


@pytest.mark.optimized
def test_one_fragment_without_delay_is_diloco():
    """Up to rounding: DiLoCo averages the workers of a device first."""
    ends = []
    for method in (
        jaxlocal.diloco(grad_fn, optax.adam(0.1), period=3),
        jaxlocal.streaming_diloco(
            grad_fn,
            optax.adam(0.1),
            period=3,
            fragments=1,
            delay_steps=0,
            mixing_factor=0.0,
        ),
    ):
        models, _, state = run(method, [3, 3, 3])
        ends.append((models, state.params, state.anchor, state.opt_state))
    equal = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(equal, *ends)


def test_an_outer_step_of_one_without_delay_is_local_sgd():
    with jax.enable_x64(True):
        local, _, _ = run(jaxlocal.local_sgd(grad_fn, heavy_ball(), period=5), [5, 5])
        plain = optax.sgd(1.0)
        method = jaxlocal.streaming_diloco(
            grad_fn,
            heavy_ball(),
            period=5,
            outer_optimizer=plain,
            fragments=1,
            delay_steps=0,
            mixing_factor=0.0,
        )
        models, _, _ = run(method, [5, 5])
    for now in local:
        np.testing.assert_allclose(models[now], local[now], **CLOSE)


@pytest.mark.optimized
def test_fragments_take_turns_and_leave_the_others_alone():
    """Rounds 0 and 3 synchronise a and d, rounds 1 and 4 b, rounds 2 and 5 c."""
    method = jaxlocal.streaming_diloco(
        grad_fn,
        optax.sgd(0.1),
        period=9,
        fragments=3,
        delay_steps=1,
        mixing_factor=0.5,
    )
    round_fn = problems.on_one_device(method, GRID)
    state = round_fn.init(FOUR, jax.random.key(0))
    batches = problems.make_batches(GRID, 18)
    for number, start in enumerate(range(0, 18, 3)):
        before = jax.tree.map(np.asarray, (state.anchor, state.memory))
        alone = jax.tree.map(jnp.copy, state)
        for now in range(start, start + 3):
            alone, _ = round_fn.local_steps(alone, problems.steps_of(batches, now, now + 1))
        state, info = round_fn(state, problems.steps_of(batches, start, start + 3))
        assert info.worker["loss"].shape == (3, *GRID.shape)
        turn = ("ad", "b", "c")[number % 3]
        for name in "abcd":
            anchor_stays = np.array_equal(state.anchor[name], before[0][name])
            params_stay = np.array_equal(state.params[name], alone.params[name])
            assert anchor_stays == params_stay == (name not in turn)
        _, (count, outer) = state.memory
        assert count.single == number + 1
        for fragment, memory in enumerate(outer):
            same = jax.tree.map(np.array_equal, memory, before[1][1][1][fragment])
            assert all(jax.tree.leaves(same)) == (fragment != number % 3)


def test_the_average_and_the_steps_that_overlap_it_do_not_wait_for_each_other():
    method = jaxlocal.streaming_diloco(
        grad_fn, optax.sgd(0.1), period=6, fragments=2, delay_steps=2
    )
    round_fn = RoundFn(method, GRID, make_mesh(GRID, shape=(2, 4)))
    state = round_fn.shapes(FOUR)
    batches = jax.tree.map(lambda b: b[:2], problems.make_batches(GRID, 2))
    program = lambda state: round_fn.end_round(state, batches)
    both = [
        inner
        for inner in jaxprs(jax.make_jaxpr(program)(state).jaxpr)
        if {"psum", "scan"} <= {kind(eqn) for eqn in inner.eqns}
    ]
    assert len(both) == 2  # one for each fragment
    for inner in both:
        assert not reaches(inner, "psum", "scan") and not reaches(inner, "scan", "psum")
        loops = [eqn for eqn in inner.eqns if kind(eqn) == "scan"]
        within = {kind(eqn) for loop in loops for sub in jaxprs(loop) for eqn in sub.eqns}
        assert "psum" not in within


@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=20),
    share=st.floats(0, 1),
)
def test_fragments_are_balanced(sizes, share):
    fragments = 1 + int(share * (len(sizes) - 1))
    params = [jax.ShapeDtypeStruct((size,), np.float32) for size in sizes]
    of = np.asarray(fragments_of(params, fragments))
    weights = np.bincount(of, sizes, fragments)
    assert len(weights) == fragments and weights.min() > 0
    assert weights.max() - weights.min() <= max(sizes)


def test_fragments_are_sized_in_bytes():
    sized = lambda size, dtype: jax.ShapeDtypeStruct((size,), dtype)
    wide, narrow = sized(8, jnp.float32), sized(16, jnp.bfloat16)
    tree = {"a": wide, "b": (narrow, None), "c": sized(9, jnp.bfloat16)}
    assert fragments_of(tree, 2) == {"a": 0, "b": (1, None), "c": 0}


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_workers_that_do_not_move_leave_the_anchor_where_it_is(dtype):
    still = jaxlocal.gradients(lambda w, batch, key: (0 * w * batch.astype(w.dtype)).sum())
    method = jaxlocal.streaming_diloco(
        still,
        optax.sgd(0.1),
        period=2,
        fragments=1,
        delay_steps=1,
        mixing_factor=0.25,
    )
    round_fn = problems.on_one_device(method, Layout(1, 3, weights=[1, 2, 4]))
    begin = jnp.asarray(np.random.default_rng(0).normal(size=50), dtype)
    state = round_fn.init(begin, jax.random.key(0))
    for _ in range(4):
        state, _ = round_fn(state, np.ones((2, 1, 3, 50), np.float32))
    np.testing.assert_array_equal(np.asarray(state.anchor), np.asarray(begin, np.float32))
    np.testing.assert_allclose(
        np.asarray(state.params, np.float32), np.broadcast_to(begin, (1, 3, 50)), rtol=2e-7
    )


def refused(message):
    return pytest.raises(ConfigurationError, match=message)


def test_what_does_not_fit_is_an_error():
    layout, batches = Layout(1, 2), problems.make_batches(Layout(1, 2), 4)
    make = lambda **options: jaxlocal.streaming_diloco(grad_fn, optax.sgd(0.1), period=8, **options)
    start = lambda method: problems.on_one_device(method, layout).init(FOUR, jax.random.key(0))
    with refused("4 tensors does not divide into 8 fragments"):
        start(make(fragments=8))
    with refused(r"mixing factor.*\[0, 1\], got 1.5"):
        make(mixing_factor=1.5)
    with refused(r"all workers common.*\('workers',\)"):
        overlapped(compose.sequence(), mixing.hub_mean(), optax.sgd(1.0))
    with refused("at least 1 .*got 0"):
        make(fragments=0)
    with refused("delay.*at least 0 steps, got -1"):
        make(delay_steps=-1)
    keeping = make().inner._replace(init=lambda state: Memory(stacked=state.params))
    stage = overlapped(keeping, mixing.mean(), optax.sgd(1.0))
    with refused("may keep no memory"):
        start(make()._replace(outer=stage))
    round_fn = problems.on_one_device(make(delay_steps=3), layout)
    state = round_fn.init(FOUR, jax.random.key(0))
    with refused("H = 3 is too short.*last τ = 3"):
        round_fn(state, problems.steps_of(batches, 0, 3))
    with refused("takes 3 steps, got batches of 4"):
        round_fn.end_round(state, batches)
    with refused("takes 3 steps, which is not a multiple of the 2"):
        RoundFn(make(delay_steps=3)._replace(inner=compose.repeat(make().inner, 2)), layout)
