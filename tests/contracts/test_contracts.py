"""Properties that hold for every method, tested on the registry of all of them."""

from typing import NamedTuple

import compilations
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from registry import METHODS, OPTIMIZERS
from saved_states import as_numbers

import jaxlocal
from jaxlocal import Layout, RoundFn
from jaxlocal.communication import mixing
from jaxlocal.methods import METHODS as TABLE
from jaxlocal.stages import compose
from jaxlocal.stages.compose import NOTHING
from jaxlocal.stages.local_step import local_step
from jaxlocal.types import Info, Memory, Method, Stage, TrainState


class Case(NamedTuple):
    """A registered method after its first round."""

    entry: registry.Entry
    round_fn: RoundFn
    before: TrainState  # shapes and shardings only
    state: TrainState
    info: Info
    traces: list[int]  # of the loss: counts up
    compiled: list[str]  # by the first round


def run(case: Case, state: TrainState, rounds: int, first: int = 0):
    infos = []
    for number in range(first, first + rounds):
        steps = case.entry.steps
        batches = registry.batches(case.entry.layout, number * steps, steps)
        state, info = case.round_fn(state, batches, length=steps)
        infos.append(info)
    return state, infos


def described(state: TrainState):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def start(entry: registry.Entry, round_fn: RoundFn, seed: int = 0) -> TrainState:
    return round_fn.init(entry.params(), jax.random.key(seed), registry.model_state())


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, as_numbers(one), as_numbers(other))


@pytest.fixture(scope="module", params=registry.CASES, ids=lambda case: "-".join(case))
def case(request):
    method, optimizer = request.param
    entry, traces = METHODS[method], [0]

    def loss(*arguments):
        traces[0] += 1
        return registry.loss(*arguments)

    grad_fn = jaxlocal.gradients(loss, stateful=True)
    round_fn = RoundFn(entry.build(grad_fn, OPTIMIZERS[optimizer]), entry.layout)
    state = start(entry, round_fn)
    before, batches = described(state), registry.batches(entry.layout, 0, entry.steps)
    with compilations.counted() as compiled:
        state, info = round_fn(state, batches, length=entry.steps)
    return Case(entry, round_fn, before, state, info, traces, compiled)


def test_every_method_is_in_the_registry():
    listed = {method.split("-")[0] for method, _ in registry.CASES}
    assert set(TABLE) <= listed
    assert listed - set(TABLE) == {"clipped_sgd"}  # README's own method


def test_a_round_leaves_structure_shapes_dtypes_and_sharding_alone(case):
    after = described(case.state)
    assert jax.tree.structure(after) == jax.tree.structure(case.before)
    for one, other in zip(jax.tree.leaves(case.before), jax.tree.leaves(after), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_the_state_is_sharded_as_its_contract_says(case):
    stacked = NamedSharding(case.round_fn.mesh, P("hubs", "workers"))
    for part in (case.state.params, case.state.opt_state, case.state.model_state):
        for leaf in jax.tree.leaves(part):
            assert leaf.shape[:2] == case.entry.layout.shape
            assert leaf.sharding.is_equivalent_to(stacked, leaf.ndim)
            assert len({shard.device for shard in leaf.addressable_shards}) == 8
    for leaf in jax.tree.leaves((case.state.anchor, case.state.key, case.state.step)):
        assert leaf.is_fully_replicated
    assert int(case.state.step) == case.entry.steps


def test_reports_lead_with_steps_and_the_worker_grid(case):
    expected = (case.entry.steps, *case.entry.layout.shape)
    assert {"loss", "active", "largest"} == set(case.info.worker)
    assert {x.shape for x in case.info.worker.values()} == {expected}


def test_four_more_rounds_trace_and_compile_nothing(case):
    traced, state = case.traces[0], start(case.entry, case.round_fn)
    with compilations.counted() as compiled:
        run(case, state, 4)
    # One program of a round of a constant period; else one of the inner stage and, unless that is
    # nothing, one of the outer stage. JAX may trace each a second time, for shapes only. An outer
    # stage with steps has them in every turn.
    outer = case.round_fn.method.outer
    whole = case.round_fn.method.period.constant or outer is NOTHING
    assert len(case.compiled) == (1 if whole else 2)
    assert 1 <= traced <= 2 * (1 + (outer.turns if outer.steps else 0))
    assert case.traces[0] == traced
    assert compiled == []


def test_the_users_parameters_and_key_outlive_the_donated_state(case):
    params, key, model_state = case.entry.params(), jax.random.key(5), registry.model_state()
    first = case.round_fn.init(params, key, model_state)
    run(case, first, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert_same_bits(
        (params, key, model_state),
        (case.entry.params(), jax.random.key(5), registry.model_state()),
    )


def test_a_run_restored_from_a_numpy_file_continues_bit_for_bit(case, tmp_path):
    state, _ = run(case, start(case.entry, case.round_fn), 2)
    np.savez(tmp_path / "state.npz", *jax.tree.leaves(as_numbers(state)))
    stored = np.load(tmp_path / "state.npz")

    def restore(number, like):
        array = stored[f"arr_{number}"]
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            array = jax.random.wrap_key_data(array)
        elif array.dtype.kind == "V":  # a numpy file keeps bfloat16 as bytes
            array = array.view(like.dtype)
        return jax.device_put(array, like.sharding)

    leaves, structure = jax.tree.flatten(described(state))
    restored = structure.unflatten([restore(n, like) for n, like in enumerate(leaves)])
    uninterrupted, infos = run(case, state, 2, first=2)
    resumed, same_infos = run(case, restored, 2, first=2)
    assert_same_bits(uninterrupted, resumed)
    assert_same_bits(infos, same_infos)


def test_what_a_round_reports_is_not_fed_back(case):
    kept, _ = run(case, start(case.entry, case.round_fn), 3)
    state = start(case.entry, case.round_fn)
    for number in range(3):
        state, (info,) = run(case, state, 1, first=number)
        for leaf in jax.tree.leaves(info):
            leaf.fill(0) if isinstance(leaf, np.ndarray) else leaf.delete()
    assert_same_bits(kept, state)


def test_one_seed_gives_one_run_and_another_seed_another(case):
    one, infos = run(case, start(case.entry, case.round_fn, seed=1), 2)
    again, same_infos = run(case, start(case.entry, case.round_fn, seed=1), 2)
    other, other_infos = run(case, start(case.entry, case.round_fn, seed=2), 2)
    assert_same_bits((one, infos), (again, same_infos))
    assert (as_numbers(one.params["matrix"]) != as_numbers(other.params["matrix"])).any()
    # The noise of the loss differs at the first step already, where the parameters are equal.
    first, second = (as_numbers(i[0].worker["loss"])[0] for i in (infos, other_infos))
    assert (first != second).any()


@pytest.mark.optimized
def test_metrics_of_the_loss_change_no_bit_of_the_run():
    def without_metrics(*arguments):
        value, (model_state, _) = registry.loss(*arguments)
        return value, (model_state, {})

    entry, ends = METHODS["local_sgd"], []
    for loss in (registry.loss, without_metrics):
        method = entry.build(jaxlocal.gradients(loss, stateful=True), OPTIMIZERS["adamw"])
        round_fn = RoundFn(method, entry.layout)
        ends.append(round_fn(start(entry, round_fn), registry.batches(entry.layout, 0, 4))[0])
    assert_same_bits(*ends)


EAGER = {
    "data_parallel": (lambda g, o: jaxlocal.data_parallel(g, o, worker_map="vmap"), Layout(1, 2)),
    "mll_sgd": (
        lambda g, o: jaxlocal.mll_sgd(
            g, o, matrix=np.full((2, 2), 0.5), local_steps=1, hub_period=1, worker_map="map"
        ),
        Layout(2, 1),
    ),
}


@pytest.mark.parametrize("method", EAGER)
def test_without_jit_a_round_computes_the_same(method):
    build, layout = EAGER[method]
    grad_fn = jaxlocal.gradients(lambda w, batch, key: jnp.square(jnp.tanh(w) - batch).sum())
    batches = np.random.default_rng(0).normal(size=(1, *layout.shape, 3)).astype(np.float32)
    ends = []
    for eager in (False, True):
        round_fn = RoundFn(build(grad_fn, optax.sgd(0.1)), layout)
        state = round_fn.init(jnp.ones(3), jax.random.key(0))
        with jax.disable_jit(eager):
            ends.append(round_fn(state, batches))
    # Eager operations are not fused: products are rounded before they are added.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(close, *as_numbers(ends))


def test_every_stage_keeps_its_own_memory_over_the_rounds():
    def tally(increment):
        """A stage that counts its applications, for every worker and once for all."""

        def init(state):
            return Memory(stacked=jnp.zeros_like(state.opt_state[0].count), single=jnp.int32(0))

        def apply(state, memory, batches, context):
            assert state.memory == ()
            counts = Memory(memory.stacked + increment * context.worker, memory.single + increment)
            return state, counts, Info()

        return Stage(init, apply, 0, lambda state, number=0: [])

    optimizer = optax.adam(0.1)
    grad_fn = jaxlocal.gradients(lambda w, batch, key: jnp.square(w - batch).sum())
    inner = compose.sequence(
        compose.repeat(compose.sequence(local_step(grad_fn, optimizer), tally(1)), 2), tally(10)
    )
    outer = compose.sequence(jaxlocal.stages.sync(mixing.mean()), tally(100))
    round_fn = RoundFn(Method(inner, outer, optimizer, jaxlocal.periods.constant(6)), Layout(2, 4))
    state = round_fn.init(jnp.zeros(3), jax.random.key(0))
    for _ in range(3):
        state, _ = round_fn(state, np.ones((6, 2, 4, 3), np.float32))
    ((_, steps), hub_stage), (_, end) = state.memory
    number = np.arange(8).reshape(2, 4)
    for memory, expected in ((steps, 18), (hub_stage, 90), (end, 300)):
        np.testing.assert_array_equal(memory.stacked, expected * number)
        assert int(memory.single) == expected and memory.single.is_fully_replicated
