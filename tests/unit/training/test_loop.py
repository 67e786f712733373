"""The host loop of a run: resuming, bits sent, measurements and divergence."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, training
from jaxlocal.training import Diverged, Evaluation
from jaxlocal.types import MessageBits, Method

PARAMS = {"weight": np.zeros(3, np.float32), "bias": jnp.zeros((), jnp.bfloat16)}
MODEL_BITS = 3 * 32 + 16
SGD, ADAM = optax.sgd(0.1), optax.adam(0.1)


def loss(params, batch, key):
    bias = params["bias"].astype(jnp.float32)
    return jnp.square(jnp.tanh(params["weight"]) + bias - batch).mean()


grad_fn = jaxlocal.gradients(loss)


def batches_of(layout: Layout):
    """batches(start, steps), a function of the step only."""

    def at(step):
        return np.random.default_rng(step).normal(size=(*layout.shape, 3)).astype(np.float32)

    return lambda start, steps: np.stack([at(step) for step in range(start, start + steps)])


def one_device(method: Method, layout: Layout, **options) -> RoundFn:
    return RoundFn(method, layout, jaxlocal.make_mesh(layout, jax.devices()[:1]), **options)


def start(round_fn: RoundFn):
    return round_fn.init(PARAMS, jax.random.key(0))


@functools.cache
def two_fragments_of_two_workers() -> RoundFn:
    method = jaxlocal.streaming_diloco(
        grad_fn, optax.adam(0.1), period=10, outer_optimizer=None, fragments=2, delay_steps=2
    )
    return one_device(method, Layout(workers_per_hub=2))


@pytest.mark.optimized
@pytest.mark.parametrize("measure_every", [0, 1, 3])
def test_a_run_with_an_outer_stage_of_steps_can_be_resumed_from_every_dispatch(measure_every):
    round_fn = two_fragments_of_two_workers()
    layout, batches = round_fn.layout, batches_of(round_fn.layout)
    progresses, ends = [], {}
    for progress in training.run(round_fn, start(round_fn), batches, 17, measure_every):
        progresses.append(progress._replace(state=None))
        ends[progress.step] = jax.tree.map(jnp.copy, progress.state)
    assert [s.step for s in progresses if s.due] == {
        0: [0, 5, 10, 17],
        1: [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 17],
        3: [0, 3, 6, 10, 12, 15, 17],
    }[measure_every]
    assert [s.round for s in progresses if s.step in (5, 10, 17)] == [1, 2, 3]
    for middle in (3, 5, 15):
        state = jax.tree.map(jnp.copy, ends[middle])
        rest = list(training.run(round_fn, state, batches, 17, measure_every))
        for progress, same in zip(rest, progresses[-len(rest) :], strict=True):
            assert progress.step == same.step and progress.message_bits == same.message_bits
        jax.tree.map(np.testing.assert_array_equal, rest[-1].state.params, ends[17].params)
    # The losses of all steps are read, also of those that overlap with a synchronisation.
    with pytest.raises(Diverged, match="worker 1 is nan at step 9"):
        poison = poisoned(layout, np.nan, (9, 0, 1))
        list(training.run(round_fn, start(round_fn), poison, 17, measure_every))
    with pytest.raises(
        ConfigurationError, match="resumed at step 4, while the round from step 3 to 5"
    ):
        next(training.dispatches(round_fn, 17, start=4))


def test_a_run_asks_for_every_batch_once_and_only_when_progress_is_asked_for():
    layout, asked = Layout(workers_per_hub=2), []
    round_fn = one_device(jaxlocal.local_sgd(grad_fn, SGD, period=5), layout)

    def batches(start, steps):
        asked.append((start, steps))
        return batches_of(layout)(start, steps)

    progresses = training.run(round_fn, start(round_fn), batches, 12)
    first = next(progresses)
    assert (first.step, first.round, first.round_length, first.due) == (0, 0, 5, True)
    assert math.isnan(first.loss) and asked == []
    second = next(progresses)
    assert asked == [(0, second.step)]
    rest = list(progresses)
    assert [s for s, _ in asked] == [0, *itertools.accumulate(n for _, n in asked)][:-1]
    assert sum(n for _, n in asked) == 12 and rest[-1].step == int(rest[-1].state.step) == 12
    assert [s.round_length for s in (second, *rest) if s.due] == [5, 5, 2]


def poisoned(layout, value, *places):
    clean = batches_of(layout)

    def batches(start, steps):
        out = clean(start, steps)
        for at, hub, worker in places:
            if start <= at < start + steps:
                out[at - start, hub, worker] = value
        return out

    return batches


@functools.cache
def four_steps_of_eight_workers() -> RoundFn:
    return one_device(jaxlocal.local_sgd(grad_fn, SGD, period=4), Layout(2, 4))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("measure_every", [0, 1, 2, 6])
def test_divergence_names_step_and_worker_and_precedes_later_measurements(measure_every, value):
    round_fn = four_steps_of_eight_workers()
    layout = round_fn.layout
    # Worker 6 diverges at step 5; worker 1 diverges later, which is not reported.
    batches = poisoned(layout, value, (5, 1, 2), (7, 0, 1))
    progresses = []
    with pytest.raises(Diverged, match=f"worker 6 is {value} at step 5") as raised:
        for progress in training.run(round_fn, start(round_fn), batches, 16, measure_every):
            progresses.append(progress)
    assert (raised.value.step, raised.value.worker) == (5, 6)
    due = {0: [0, 4], 1: [0, 1, 2, 3, 4, 5], 2: [0, 2, 4], 6: [0]}[measure_every]
    assert [progress.step for progress in progresses if progress.due] == due
    assert all(
        math.isfinite(progress.loss) for progress in progresses if progress.due and progress.step
    )


def test_divergence_without_measurements_is_raised_two_dispatches_later():
    layout = Layout(2, 4)
    round_fn = one_device(jaxlocal.local_sgd(grad_fn, SGD, period=16), layout, max_chunk=1)
    seen = []
    with pytest.raises(Diverged):
        for progress in training.run(
            round_fn, start(round_fn), poisoned(layout, np.nan, (5, 1, 2)), 16
        ):
            seen.append(progress.step)
    # The dispatch of step 5 ends at 6; the host does not wait for it immediately.
    assert 6 <= seen[-1] <= 8


def test_the_consensus_distance_is_measured_before_the_synchronisation():
    layout = Layout(2, 4, weights=np.arange(1, 9))
    method = jaxlocal.local_sgd(grad_fn, SGD, period=4)
    round_fn, batches = RoundFn(method, layout), batches_of(layout)
    single = jax.tree.map(lambda x: x.astype(np.float32), PARAMS)
    first = round_fn.init(single, jax.random.key(0))
    progresses = training.run(round_fn, first, batches, 8, measure_every=2)
    measured = {progress.step: progress.distance for progress in progresses}
    state, share = round_fn.init(single, jax.random.key(0)), np.arange(1, 9) / 36
    assert measured.pop(0) == 0
    for now in (2, 4, 6, 8):
        state, _ = round_fn.local_steps(state, batches(now - 2, 2))
        leaves = [np.asarray(x, np.float64).reshape(8, -1) for x in jax.tree.leaves(state.params)]
        models = np.concatenate(leaves, axis=1)
        squares = np.square(models - share @ models).sum(axis=1)
        np.testing.assert_allclose(measured[now], math.sqrt(share @ squares), rtol=1e-5)  # float32
        if now % 4 == 0:
            state, _ = round_fn.end_round(state)
            assert float(round_fn.consensus_distance(state)) == 0


def test_the_loss_of_a_step_is_the_weighted_mean_over_workers_that_took_their_step():
    layout = Layout(2, 4, weights=np.arange(1, 9), rates=0.5)
    method = jaxlocal.local_sgd(
        jaxlocal.gradients(lambda params, batch, key: batch.sum() + 0 * params["weight"].sum()),
        SGD,
        period=4,
    )
    round_fn, batches = one_device(method, layout), batches_of(layout)
    progresses = list(training.run(round_fn, start(round_fn), batches, 8))
    _, info = round_fn.local_steps(start(round_fn), batches(0, 4))
    weight = np.asarray(info.worker["active"]) * np.arange(1, 9).reshape(2, 4)
    assert 0 < weight.astype(bool).mean() < 1
    expected = (batches(0, 4).sum(-1) * weight).sum() / weight.sum()
    np.testing.assert_allclose(progresses[1].loss, expected, rtol=1e-5)  # sums of float32 losses


@pytest.mark.optimized
def test_measuring_does_not_change_the_run():
    layout = Layout(workers_per_hub=8, rates=0.7)
    round_fn, ends = RoundFn(jaxlocal.local_sgd(grad_fn, ADAM, period=6), layout), []
    for measure_every in (0, 1, 5):
        progresses = training.run(round_fn, start(round_fn), batches_of(layout), 20, measure_every)
        *_, last = progresses
        ends.append(jax.tree.map(np.asarray, (last.state.params, last.state.opt_state)))
        assert last.message_bits == MessageBits(workers=4 * MODEL_BITS)
    for other in ends[1:]:
        jax.tree.map(np.testing.assert_array_equal, ends[0], other)


@functools.cache
def eight_different_workers(devices: int):
    """A round function and its state after one step, with a model state that differs too."""

    def stateful(params, model_state, batch, key):
        return loss(params, batch, key), ({"shift": model_state["shift"] + batch[0]}, {})

    layout = Layout(workers_per_hub=8, weights=np.arange(1, 9))
    method = jaxlocal.local_sgd(jaxlocal.gradients(stateful, stateful=True), SGD, period=1)
    round_fn = RoundFn(method, layout, jaxlocal.make_mesh(layout, jax.devices()[:devices]))
    state = round_fn.init(PARAMS, jax.random.key(0), {"shift": jnp.zeros(())})
    return round_fn, round_fn.local_steps(state, batches_of(layout)(0, 1))[0]


def metrics(params, model_state, batch):
    outputs = batch["x"] @ params["weight"] + model_state["shift"]
    # The labels are int8, in which a sum of two would overflow.
    return {"output": outputs, "label": batch["label"], "positive": outputs > 0}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("examples", "batch_size"), [(1, 500), (7, 500), (64, 3), (509, 500), (509, 7)]
)
def test_an_evaluation_is_the_mean_over_examples_of_the_average_model(
    devices, examples, batch_size
):
    round_fn, state = eight_different_workers(devices)
    random, share = np.random.default_rng(0), np.arange(1, 9) / 36
    data = {
        "x": random.normal(size=(examples, 3)).astype(np.float32),
        "label": random.integers(100, 128, examples).astype(np.int8),
    }
    weight = share @ np.asarray(state.params["weight"], np.float64)[0]
    outputs = data["x"] @ weight + share @ np.asarray(state.model_state["shift"])[0]
    chosen = random.permutation(examples)[: max(1, examples // 3)]
    for subset in (None, chosen):
        rows = slice(None) if subset is None else subset
        got = Evaluation(round_fn, metrics, data, subset, batch_size)(state)
        assert all(type(value) is float for value in got.values())
        # Sums of hundreds of numbers of size one in float32.
        np.testing.assert_allclose(got["output"], outputs[rows].mean(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got["label"], data["label"][rows].mean(), rtol=1e-6)
        np.testing.assert_allclose(got["positive"], (outputs[rows] > 0).mean(), rtol=1e-6)


def test_an_evaluation_takes_the_pool_of_the_round_function_by_default():
    pool = np.arange(10, dtype=np.float32)
    round_fn = RoundFn(
        jaxlocal.local_sgd(grad_fn, SGD, period=1), Layout(workers_per_hub=8), data=pool
    )
    evaluation = Evaluation(round_fn, lambda params, model_state, batch: {"mean": batch})
    assert evaluation(start(round_fn)) == {"mean": 4.5}


def test_a_state_is_finite_when_a_checkpoint_is_due():
    """The update of step 3 is infinite, but the losses until step 4 are finite."""
    grad_fn = jaxlocal.gradients(lambda w, batch, key: (w * 0 + 1).sum())
    progress = jaxlocal.scale_by_step(lambda step: jnp.where(step == 3, jnp.inf, 0.1))
    layout = Layout(1, 2)
    round_fn = one_device(jaxlocal.local_sgd(grad_fn, progress, period=2), layout)
    state = round_fn.init(jnp.zeros(()), jax.random.key(0))
    batches = lambda start, steps: np.zeros((steps, 1, 2, 1), np.float32)
    progresses = training.run(round_fn, state, batches, 8, measure_every=8, save_every=2)
    saved = []
    with pytest.raises(Diverged, match="not finite at step 4"):
        for progress in progresses:
            saved += [progress.step] * progress.save
    assert saved == [2]
    with pytest.raises(ConfigurationError, match="checkpoints must be ≥ 0, got -1"):
        next(training.run(round_fn, state, batches, 8, save_every=-1))
    with pytest.raises(ConfigurationError, match="checkpoints must be an integer, got 2.5"):
        next(training.run(round_fn, state, batches, 8, save_every=2.5))
