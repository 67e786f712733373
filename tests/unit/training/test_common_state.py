"""Where all workers have the same model after a round, a state holds one, and says so to nobody."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn
from jaxlocal.stages.averaged_workers import _at_once, _in_turn
from jaxlocal.training import (
    Checkpoints,
    Evaluation,
    Reestimation,
    RunningAverage,
    run,
    running_average,
    with_running_averages,
)
from jaxlocal.training.common_state import CommonState, held

LAYOUT = Layout(2, 4, weights=np.arange(1.0, 9.0))
STEPS, RATE = 3, 0.1
START = {"w": np.array([0.5, -1.0, 2.0], np.float32), "b": np.float32(0.25)}
random = np.random.default_rng(0)
BATCHES = random.normal(size=(2, STEPS, *LAYOUT.shape, 5, 3)).astype(np.float32)


def loss(params, batch, key):
    return jnp.square(jnp.tanh(batch @ params["w"] + params["b"]) - 0.5).mean()


grad_fn = jaxlocal.gradients(loss)
momentum = functools.partial(optax.sgd, momentum=0.9)


@functools.cache
def round_fn_of(name="local_sgd", optimizer="sgd", devices=1, **options):
    optimizer = {
        "sgd": optax.sgd(RATE),
        "momentum": momentum(RATE),
        "scheduled": momentum(lambda step: RATE / (1 + step)),
    }[optimizer]
    method = getattr(jaxlocal, name)(grad_fn, optimizer, period=STEPS, **options)
    return RoundFn(method, LAYOUT, jaxlocal.make_mesh(LAYOUT, jax.devices()[:devices]))


def start(round_fn):
    return round_fn.init(START, jax.random.key(0))


def gradient(w, b, batch):
    """Of the loss, on the host in float64."""
    out = np.tanh(batch @ w + b)
    inner = 2 * (out - 0.5) * (1 - out**2) / len(batch)
    return batch.T @ inner, inner.sum()


def by_hand(rounds):
    """The models of Local SGD after some rounds, and the distances before each average."""
    w, b = START["w"].astype(float), float(START["b"])
    shares = LAYOUT.weight.reshape(-1)
    distances = []
    for batches in rounds.astype(float):
        ends = []
        for worker in range(LAYOUT.workers):
            own_w, own_b = w, b
            for batch in batches.reshape(STEPS, LAYOUT.workers, 5, 3)[:, worker]:
                grad_w, grad_b = gradient(own_w, own_b, batch)
                own_w, own_b = own_w - RATE * grad_w, own_b - RATE * grad_b
            ends.append([*own_w, own_b])
        mean = shares @ np.array(ends)
        distances.append(np.sqrt(shares @ np.square(ends - mean).sum(1)))
        w, b = mean[:3], mean[3]
    return w, b, distances


@pytest.mark.parametrize("devices", [1, 8])
def test_rounds_are_those_of_a_loop_on_the_host(devices):
    round_fn = round_fn_of(devices=devices)
    state = start(round_fn)
    for batches in BATCHES:
        state, info = round_fn(state, batches)
    w, b, _ = by_hand(BATCHES)
    np.testing.assert_allclose(state.params["w"], np.broadcast_to(w, (2, 4, 3)), rtol=1e-5)
    np.testing.assert_allclose(state.params["b"], np.full((2, 4), b), rtol=1e-5)
    assert info.worker["loss"].shape == (STEPS, 2, 4) and int(state.step) == 2 * STEPS


@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_knows_the_distance_before_each_average(devices):
    round_fn = round_fn_of(devices=devices)
    steps = BATCHES.reshape(2 * STEPS, *BATCHES.shape[2:])
    batches = lambda start, count: steps[start : start + count]
    progresses = list(run(round_fn, start(round_fn), batches, 2 * STEPS))[1:]
    *_, distances = by_hand(BATCHES)
    np.testing.assert_allclose([p.distance for p in progresses], distances, rtol=1e-5)
    assert [p.step for p in progresses] == [STEPS, 2 * STEPS]


HELD = [  # (method, options, how many of the leaves of the optimizer state are one row)
    (("local_sgd", "sgd"), {}, 0),
    (("local_sgd", "momentum"), {}, 0),
    (("local_sgd", "momentum"), {"optimizer_state": "average"}, 2),
    (("local_sgd", "scheduled"), {"optimizer_state": "reset"}, 2),
    (("diloco", "momentum"), {"optimizer_state": "reset"}, 2),
    (("slowmo", "momentum"), {"learning_rate": RATE}, 0),
]


@pytest.mark.parametrize(("made", "options", "rows"), HELD)
def test_what_is_the_same_is_held_once_with_the_numbers_of_rows(made, options, rows):
    """A round from one row, and one from a row for every worker, which is cut in two programs."""
    round_fn = round_fn_of(*made, **options)
    one, every = start(round_fn), start(round_fn)
    every = every._replace(params=every.params)
    assert isinstance(one, CommonState) and not isinstance(every, CommonState)
    for batches in BATCHES:
        one, _ = round_fn(one, batches)
        every, _ = round_fn.local_steps(every, batches)
        every, _ = round_fn.end_round(every)
    single = lambda tree: sum(x.shape[:2] == (1, 1) for x in jax.tree.leaves(tree))
    assert single(held(one).params) == 2 and single(held(one).opt_state) == rows
    values = lambda state: jax.tree.map(np.asarray, tuple(state._replace(key=())))
    jax.tree.map(np.testing.assert_array_equal, values(one), values(every))


def test_running_averages_are_held_once_too_and_change_no_bit():
    method = jaxlocal.local_sgd(grad_fn, momentum(RATE), period=STEPS)
    averaged = with_running_averages(method, ema=RunningAverage(decay=0.5))
    plain, with_ema = RoundFn(method, LAYOUT), RoundFn(averaged, LAYOUT)
    without, one, every = start(plain), start(with_ema), start(with_ema)
    for batches in BATCHES:
        without, _ = plain(without, batches)
        one, _ = with_ema(one, batches)
        every, _ = with_ema.local_steps(every, batches)
        every, _ = with_ema.end_round(every)
    equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    equal(one.params, without.params)
    ema = running_average(one, "ema")
    assert isinstance(ema, CommonState) and ema.params["w"].shape == (2, 4, 3)
    equal(ema.params, running_average(every, "ema").params)
    assert (np.asarray(ema.params["w"]) != np.asarray(one.params["w"])).any()
    assert {x.shape[:2] for x in jax.tree.leaves(held(one).memory.outer)[:2]} == {(1, 1)}
    assert jax.tree.leaves(one.memory.outer)[0].shape[:2] == (2, 4)


def test_one_round_function_takes_models_of_several_trees_and_states_of_another():
    sums = jaxlocal.gradients(lambda params, batch, key: sum(map(jnp.sum, params)) * batch)
    averaged, kept = (
        RoundFn(
            jaxlocal.local_sgd(sums, momentum(RATE), period=2, optimizer_state=option),
            Layout(workers_per_hub=2),
        )
        for option in ("average", "keep")
    )
    for leaves in (1, 2):
        state = averaged.init([jnp.ones(3)] * leaves, jax.random.key(0))
        for round_fn in (averaged, kept):  # whose momenta are held once, and for each worker
            state, _ = round_fn(state, np.ones((2, 1, 2), np.float32))
        assert [x.shape for x in jax.tree.leaves(held(state).opt_state)] == [(1, 2, 3)] * leaves
        # Of gradients 1 the momenta are 1, 1.9, 2.71 and 3.439.
        np.testing.assert_allclose(state.params, np.full((leaves, 1, 2, 3), 0.0951), rtol=1e-5)


def clipped(tree):
    return jax.tree.map(lambda x: jnp.clip(x, -0.5, 0.5), tree)


def test_what_sees_each_worker_is_given_each_worker():
    """An own stage or mixer, made of one that needs the average alone, may need more."""
    local = jaxlocal.local_sgd(grad_fn, optax.sgd(10 * RATE), period=STEPS)
    mean, apply = jaxlocal.mixing.mean(), local.outer.apply
    mixer = mean._replace(average=lambda tree, context: mean.average(clipped(tree), context))
    own_stage = lambda state, *rest: apply(state._replace(params=clipped(state.params)), *rest)
    for outer in (jaxlocal.stages.sync(mixer), local.outer._replace(apply=own_stage)):
        round_fn = RoundFn(local._replace(outer=outer), LAYOUT)
        state = start(round_fn)
        assert not isinstance(state, CommonState)
        ends, _ = round_fn.local_steps(start(round_fn), BATCHES[0])
        ends = np.clip(np.asarray(ends.params["w"]), -0.5, 0.5)
        state, _ = round_fn(state, BATCHES[0])
        expected = np.tensordot(LAYOUT.weight, ends, 2)
        np.testing.assert_allclose(state.params["w"][1, 2], expected, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_leaf_without_values_takes_part(devices):
    method = jaxlocal.local_sgd(grad_fn, optax.sgd(RATE), period=STEPS)
    round_fn = RoundFn(method, LAYOUT, jaxlocal.make_mesh(LAYOUT, jax.devices()[:devices]))
    empty = {**START, "none": np.zeros((0, 3), np.float32)}
    whole, parts = (round_fn.init(empty, jax.random.key(0)) for _ in range(2))
    whole, _ = round_fn(whole, BATCHES[0])
    parts, _ = round_fn.end_round(round_fn.local_steps(parts, BATCHES[0])[0])
    for state in (whole, parts):
        assert np.asarray(state.params["none"]).shape == (2, 4, 0, 3)
    np.testing.assert_array_equal(whole.params["w"], parts.params["w"])


def test_a_checkpoint_is_restored_into_a_method_that_holds_other_leaves_once(tmp_path):
    average = round_fn_of("local_sgd", "momentum", optimizer_state="average")
    keep = round_fn_of("local_sgd", "momentum")
    of = lambda state: jax.tree.map(np.asarray, (state.params, state.opt_state))
    for number, (before, after) in enumerate([(average, keep), (keep, average)]):
        state, _ = before(start(before), BATCHES[0])
        with Checkpoints(tmp_path / str(number)) as checkpoints:
            checkpoints.save(state)
            checkpoints.wait()
            restored, _ = checkpoints.restore(after.shapes(START))
        jax.tree.map(np.testing.assert_array_equal, of(restored), of(state))
        restored, _ = after(restored, BATCHES[1])
        state, _ = after(state, BATCHES[1])
        jax.tree.map(np.testing.assert_array_equal, of(restored), of(state))


def test_re_estimated_statistics_are_held_as_the_models_are():
    def apply(params, model_state, examples):
        return {"mean": 0.9 * model_state["mean"] + 0.1 * examples.mean()}

    with_statistics = jaxlocal.gradients(
        lambda params, model_state, batch, key: (loss(params, batch, key), (model_state, {})),
        stateful=True,
    )
    for option in ("keep", "average"):
        method = jaxlocal.local_sgd(
            with_statistics, optax.sgd(RATE), period=STEPS, model_state=option
        )
        round_fn = RoundFn(method, LAYOUT)
        state = round_fn.init(START, jax.random.key(0), {"mean": np.float32(0)})
        state, _ = round_fn(state, BATCHES[0])
        estimated = Reestimation(round_fn, apply, BATCHES[0])(state)
        assert isinstance(estimated, CommonState)
        found = np.asarray(estimated.model_state["mean"])
        means = BATCHES[0].mean((0, 3, 4))
        np.testing.assert_allclose(found, np.full((2, 4), (LAYOUT.weight * means).sum()), rtol=1e-5)
        round_fn(estimated, BATCHES[1])


def test_all_rows_at_once_have_the_average_of_one_after_another():
    """As an accelerator averages them, and a CPU."""
    rows = [random.normal(size=(8, 4, 3)), random.normal(size=8), np.arange(8)]
    weight = LAYOUT.weight.reshape(-1)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in rows]
        found = [average(arrays, 2, jnp.asarray(weight)) for average in (_in_turn, _at_once)]
    mean = np.tensordot(weight, rows[0], 1), weight @ rows[1]
    off = np.square(rows[0] - mean[0]).sum((1, 2)) + np.square(rows[1] - mean[1])
    for weights, (vectors, scalars, last), spread in found:
        np.testing.assert_allclose(weights, 1, rtol=1e-14)
        np.testing.assert_allclose(vectors, mean[0], rtol=1e-12)
        np.testing.assert_allclose(scalars, mean[1], rtol=1e-12)
        np.testing.assert_allclose(spread, weight @ off, rtol=1e-12)
        assert last == 7  # of what is no average the last worker's
    alike = [jnp.full((7, 3), np.float32(0.1))]
    for average in (_in_turn, _at_once):
        np.testing.assert_array_equal(average(alike, 1, jnp.full(7, 1 / 7)).leaves[0], alike[0][0])


def test_what_workers_keep_of_their_own_stays_their_own():
    round_fn = round_fn_of("local_sgd", "scheduled", optimizer_state="reset")
    state, _ = round_fn(start(round_fn), BATCHES[0])
    trace, count = state.opt_state[0].trace, state.opt_state[1].count
    assert count.shape == (2, 4) and (count == STEPS).all()
    assert not np.any(trace["w"]) and trace["w"].shape == (2, 4, 3)
    kept = round_fn_of("local_sgd", "momentum")
    state, _ = kept(start(kept), BATCHES[0])
    trace = np.asarray(state.opt_state[0].trace["w"]).reshape(8, 3)
    assert len(np.unique(trace, axis=0)) == 8


def test_a_method_whose_workers_differ_holds_all_of_them():
    sgd, half = optax.sgd(RATE), jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), START)
    of = lambda method, layout=LAYOUT, params=START: type(
        RoundFn(method, layout).init(params, jax.random.key(0))
    )
    local = jaxlocal.local_sgd(grad_fn, sgd, period=2)
    assert of(local) is CommonState
    hubs = jaxlocal.mll_sgd(grad_fn, sgd, matrix=np.eye(2), local_steps=2, hub_period=2)
    assert of(hubs) is not CommonState
    assert of(jaxlocal.data_parallel(grad_fn, sgd)) is not CommonState
    assert of(local, Layout()) is not CommonState
    assert of(local, params=half) is not CommonState  # an average in half precision would round


def test_to_its_user_it_is_a_state_of_all_workers():
    round_fn = round_fn_of()
    state = start(round_fn)
    params, *_, step = state
    assert params["w"].shape == state[0]["w"].shape == (2, 4, 3) and int(step) == 0
    assert state.params["b"].sharding == round_fn.shapes(START).params["b"].sharding
    later = state._replace(step=jnp.int32(6))
    assert isinstance(later, CommonState) and int(later.step) == 6
    other = state._replace(params=jax.tree.map(lambda x: x + 1, state.params))
    assert not isinstance(other, CommonState) and other.params["w"].shape == (2, 4, 3)
    on_host = jax.device_get(state._replace(key=jax.random.key_data(state.key)))
    for twin in (pickle.loads(pickle.dumps(on_host)), copy.deepcopy(on_host)):
        assert isinstance(twin, CommonState)
        np.testing.assert_array_equal(twin.params["w"], np.broadcast_to(START["w"], (2, 4, 3)))
    shape = jax.jit(lambda state: jnp.zeros(state.params["w"].shape))(state).shape
    assert shape == (2, 4, 3)


def test_its_average_is_its_model_and_its_distance_nothing_unless_it_is_not_finite():
    round_fn = round_fn_of(devices=8)
    state = start(round_fn)
    mean, _ = round_fn.mean(state)
    jax.tree.map(np.testing.assert_array_equal, mean, START)
    assert round_fn.consensus_distance(state) == 0
    value = lambda params, model_state, batch: {"value": batch["x"] * params["b"]}
    assert Evaluation(round_fn, value, {"x": np.ones(3, np.float32)})(state) == {"value": 0.25}
    row = held(state)
    broken = row._replace(params={**row.params, "w": row.params["w"] * jnp.nan})
    assert np.isnan(round_fn.consensus_distance(CommonState(broken, LAYOUT.shape)))


def test_workers_that_do_not_move_stay_where_they_are_to_the_bit():
    still = jaxlocal.gradients(lambda params, batch, key: 0.0 * params["b"] + batch.sum() * 0)
    layout = Layout(workers_per_hub=7)  # shares of which no float is exact
    round_fn = RoundFn(jaxlocal.local_sgd(still, optax.sgd(0.1), period=2), layout)
    state = round_fn.init({"b": np.float32(0.1)}, jax.random.key(0))
    for _ in range(3):
        state, _ = round_fn(state, np.ones((2, 1, 7, 1), np.float32))
    np.testing.assert_array_equal(state.params["b"], np.full((1, 7), np.float32(0.1)))


@pytest.mark.parametrize("at", [STEPS, STEPS + 1])
def test_it_is_saved_and_restored_at_the_end_and_in_the_middle_of_a_round(at, tmp_path):
    round_fn = round_fn_of("local_sgd", "momentum")
    state, _ = round_fn(start(round_fn), BATCHES[0])
    if at > STEPS:
        state, _ = round_fn.local_steps(state, BATCHES[1][: at - STEPS])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(round_fn.shapes(START))
    assert type(restored) is type(state)
    values = lambda state: jax.tree.map(np.asarray, tuple(state._replace(key=())))
    jax.tree.map(np.testing.assert_array_equal, values(restored), values(state))
    rest = BATCHES[1][at - STEPS :]
    after = [round_fn.end_round(round_fn.local_steps(s, rest)[0])[0] for s in (state, restored)]
    jax.tree.map(np.testing.assert_array_equal, *map(values, after))


def test_memory_and_checkpoints_do_not_grow_with_the_workers():
    size, sizes = 100_000, {}
    for workers in (2, 1000):
        method = jaxlocal.diloco(
            jaxlocal.gradients(lambda w, batch, key: jnp.square(w * batch).sum()),
            optax.sgd(RATE, momentum=0.9),
            period=2,
            optimizer_state="reset",
        )
        layout = Layout(workers_per_hub=workers)
        round_fn = RoundFn(method, layout, jaxlocal.make_mesh(layout, jax.devices()[:1]))
        shapes = round_fn.shapes(jax.ShapeDtypeStruct((size,), np.float32))
        leaves = jax.tree.leaves(shapes._replace(key=()))
        held_bytes = sum(x.size * x.dtype.itemsize for x in leaves)
        batches = jax.ShapeDtypeStruct((2, *layout.shape), np.float32)
        [(_, lowered)] = round_fn.lower(shapes, batches)
        program = lowered.compile().memory_analysis()
        sizes[workers] = held_bytes, program.argument_size_in_bytes + program.temp_size_in_bytes
    assert sizes[2][0] == sizes[1000][0] < 5 * 4 * size
    assert sizes[1000][1] < 1.5 * sizes[2][1]
