"""Composed stages apply their parts in order, and list the messages and reports of all parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlocal import ConfigurationError, Layout
from jaxlocal.communication import mixing
from jaxlocal.communication.accounting import message_bits
from jaxlocal.stages.compose import NOTHING, in_turn, repeat, sequence
from jaxlocal.types import Info, Memory, Message, MessageBits, Stage

LAYOUT = Layout(1, 2)
BATCHES = np.arange(24.0, dtype=np.float32).reshape(12, 1, 2)


def adder(steps=1, name="sum", factor=1.0, bits=1, anchored=False):
    """A stage that adds its batches to the state and counts its applications."""

    def apply(state, memory, batches, context):
        assert batches.shape[0] == steps
        state = state + factor * jnp.sum(batches, axis=0)
        report = Info({name: batches}, {name: jnp.sum(batches, axis=(1, 2))})
        return state, memory._replace(single=memory.single + 1), report

    return Stage(
        lambda state: Memory(single=jnp.int32(0)),
        apply,
        steps,
        lambda state, number=0: [Message(mixing.mean(), values(bits))],
        anchored,
    )


def values(size):
    return jax.ShapeDtypeStruct((size,), np.uint8)


def doubler():
    """A stage without steps, as at the end of a round."""
    return Stage(
        lambda state: (),
        lambda state, memory, batches, context: (2 * state, memory, Info()),
        0,
        lambda state, number=0: [Message(mixing.mean(), values(5), times=2)],
    )


def turning(*sizes):
    """A stage that sends messages of these sizes in turn, one at each application."""
    return in_turn(*(adder(bits=size) for size in sizes))


def bits_sent(stage, number=0):
    """The bits that a worker sends in one application."""
    return message_bits(stage.communication(None, number), LAYOUT).workers


def apply(stage, batches=BATCHES):
    state = jnp.zeros((1, 2))
    return stage.apply(state, stage.init(state), batches, None)


def test_a_stage_repeated_sees_each_of_its_batches_once_and_in_turn():
    state, memory, info = apply(repeat(adder(steps=3), 4))
    np.testing.assert_array_equal(state, BATCHES.sum(axis=0))
    assert memory.single == 4
    np.testing.assert_array_equal(info.worker["sum"], BATCHES)
    np.testing.assert_array_equal(info.common["sum"], BATCHES.sum(axis=(1, 2)))


def test_repeating_counts_steps_and_messages_and_keeps_the_rest():
    stage = repeat(adder(steps=3, bits=2**40, anchored=True), 1000)
    assert stage.steps == 3000 and stage.anchored and not repeat(adder(), 2).anchored
    assert bits_sent(stage) == 8000 * 2**40 and isinstance(bits_sent(stage), int)
    assert isinstance(stage.init(None), Memory)


@pytest.mark.optimized
def test_splitting_a_number_of_times_keeps_the_bits():
    def one(state, memory, batches, context):
        return jnp.sin(state * 1.7 + batches[0]), memory, Info({"state": state[None]})

    stage = Stage(lambda state: (), one, 1, lambda state, number=0: [])
    at_once, _, info = jax.jit(lambda: apply(repeat(stage, 12)))()
    for sizes in [(6, 6), (8, 4), (5, 4, 2, 1), (1,) * 12]:
        state, start, reports = jnp.zeros((1, 2)), 0, []
        for size in sizes:
            many = jax.jit(lambda s, b, n=size: repeat(stage, n).apply(s, (), b, None))
            state, _, report = many(state, BATCHES[start : start + size])
            reports.append(report.worker["state"])
            start += size
        np.testing.assert_array_equal(state, at_once)
        np.testing.assert_array_equal(np.concatenate(reports), info.worker["state"])


def test_a_sequence_hands_each_stage_its_own_steps_and_memory():
    stage = sequence(adder(2), doubler(), adder(1, factor=10.0), doubler())
    assert stage.steps == 3
    state, memory, info = apply(stage, BATCHES[:3])
    expected = 2 * (2 * (BATCHES[0] + BATCHES[1]) + 10 * BATCHES[2])
    np.testing.assert_array_equal(state, expected)
    assert [jax.tree.leaves(part) for part in memory] == [[1], [], [1], []]
    np.testing.assert_array_equal(info.worker["sum"], BATCHES[:3])


def test_reports_are_joined_by_name():
    stage = sequence(adder(1, "a"), adder(2, "b"), adder(1, "a"))
    _, _, info = apply(stage, BATCHES[:4])
    assert set(info.worker) == set(info.common) == {"a", "b"}
    np.testing.assert_array_equal(info.worker["a"], BATCHES[[0, 3]])
    np.testing.assert_array_equal(info.worker["b"], BATCHES[1:3])
    np.testing.assert_array_equal(info.common["b"], BATCHES[1:3].sum(axis=(1, 2)))


def test_a_sequence_sends_the_messages_of_its_stages_and_is_anchored_if_one_is():
    stage = sequence(adder(bits=3), doubler(), adder(bits=4))
    assert bits_sent(stage) == 8 * (3 + 2 * 5 + 4)
    assert not stage.anchored and sequence(doubler(), adder(anchored=True)).anchored


def test_stages_in_turn_run_one_at_each_apply_and_keep_their_memories():
    stages = [adder(2, factor=factor, anchored=factor > 1) for factor in (1.0, 10.0, 100.0)]
    stage = in_turn(*stages)
    assert stage.steps == 2 and stage.anchored
    run = jax.jit(lambda state, memory, b: stage.apply(state, memory, b, None))
    state, expected = jnp.zeros((1, 2)), np.zeros((1, 2))
    memory = stage.init(state)
    for number in range(5):
        part = BATCHES[2 * number : 2 * number + 2]
        state, memory, info = run(state, memory, part)
        expected += (1.0, 10.0, 100.0)[number % 3] * part.sum(axis=0)
        np.testing.assert_array_equal(state, expected)
        np.testing.assert_array_equal(info.worker["sum"], part)
    assert [int(own.single) for own in memory[1]] == [2, 2, 1]
    with pytest.raises(ConfigurationError, match=r"the same steps, got \[0, 1\]"):
        in_turn(adder(), doubler())


@pytest.mark.parametrize("times", [1, 2, 3, 6, 7])
def test_messages_sent_in_turn_are_counted_in_turn(times):
    stage = sequence(repeat(turning(1, 10, 100), times), turning(1000, 5000))
    turns = [n % 3 for n in range(12 * times)]
    expected = [
        sum(10 ** turns[i] for i in range(n * times, n * times + times)) + (1000, 5000)[n % 2]
        for n in range(12)
    ]
    assert [bits_sent(stage, n) for n in range(12)] == [8 * e for e in expected]
    assert [bits_sent(stage, n + stage.turns) for n in range(6)] == [
        bits_sent(stage, n) for n in range(6)
    ]


@pytest.mark.parametrize("stage", [sequence(), NOTHING], ids=["empty sequence", "nothing"])
def test_a_stage_that_does_nothing_changes_nothing(stage):
    state = jnp.ones((1, 2))
    after, memory, info = stage.apply(state, stage.init(state), BATCHES[:0], None)
    assert after is state and memory == () and info == Info({}, {})
    assert stage.steps == 0 and stage.communication(state) == []


def test_stages_nest():
    """τ steps and an average, q times: the form of every method on hubs."""
    stage = repeat(sequence(repeat(adder(), 3), doubler()), 4)
    assert stage.steps == 12 and bits_sent(stage) == 8 * (12 + 4 * 2 * 5)
    state, memory, info = apply(stage)
    expected = np.zeros((1, 2))
    for start in range(0, 12, 3):
        expected = 2 * (expected + BATCHES[start : start + 3].sum(axis=0))
    np.testing.assert_array_equal(state, expected)
    assert memory[0].single == 12
    np.testing.assert_array_equal(info.worker["sum"], BATCHES)


def test_messages_add_up_as_whole_numbers():
    assert MessageBits(1, 2).plus(MessageBits(10, 20), 3) == MessageBits(31, 62)
    assert MessageBits().plus(MessageBits(2**62, 1), 4) == MessageBits(2**64, 4)
