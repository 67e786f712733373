"""Stages made of stages."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.errors import ConfigurationError
from jaxlocal.types import Info, Leaf, Memory, Stage


def repeat(stage: Stage, times: int) -> Stage:
    """The stage, `times` times over, in one `lax.scan`.

    However a number of times is split, the bits are the same.
    """
    if times < 1:
        raise ConfigurationError(f"a stage must be repeated at least once, got {times}")

    def apply(state, memory, batches, context):
        split = jax.tree.map(lambda b: b.reshape((times, stage.steps) + b.shape[1:]), batches)

        def body(carry, batch):
            state, memory = carry
            state, memory, info = stage.apply(state, memory, batch, context)
            return (state, memory), info

        (state, memory), info = lax.scan(body, (state, memory), split, length=times)
        return state, memory, jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), info)

    def communication(state, number=0):
        applies = lambda turn: len(range(turn, times, stage.turns))
        return [
            said._replace(times=said.times * applies(turn))
            for turn in range(min(times, stage.turns))
            for said in stage.communication(state, number * times + turn)
        ]

    turns = stage.turns // math.gcd(stage.turns, times)
    return stage._replace(
        apply=apply, steps=times * stage.steps, communication=communication, turns=turns
    )


def sequence(*stages: Stage) -> Stage:
    """The stages one after another; an empty sequence does nothing.

    What they report is joined by name.
    """

    def init(state):
        return tuple(stage.init(state) for stage in stages)

    def apply(state, memory, batches, context):
        memories, infos, start = [], [], 0
        for stage, own in zip(stages, memory, strict=True):
            part = jax.tree.map(lambda b, a=start, n=stage.steps: b[a : a + n], batches)
            state, own, info = stage.apply(state, own, part, context)
            memories.append(own)
            infos.append(info)
            start += stage.steps
        return state, tuple(memories), join(infos)

    def communication(state, number=0):
        return [said for stage in stages for said in stage.communication(state, number)]

    return Stage(
        init,
        apply,
        sum(stage.steps for stage in stages),
        communication,
        any(stage.anchored for stage in stages),
        math.lcm(*(stage.turns for stage in stages)),
    )


def in_turn(*stages: Stage) -> Stage:
    """One of the stages at each apply: the first, the second, and so on, and again from the first.

    One program has all of them, as the branches of a `lax.switch`, and each keeps its own memory.
    """
    steps = sorted({stage.steps for stage in stages})
    if len(steps) != 1:
        raise ConfigurationError(f"stages that take turns must take the same steps, got {steps}")

    def init(state):
        return Memory(single=jnp.int32(0)), tuple(stage.init(state) for stage in stages)

    def apply(state, memory, batches, context):
        (_, count), memories = memory

        def turn(number):
            def run(state, memories):
                own = list(memories)
                state, own[number], info = stages[number].apply(
                    state, own[number], batches, context
                )
                return state, tuple(own), info

            return run

        turns = [turn(number) for number in range(len(stages))]
        state, memories, info = lax.switch(count % len(stages), turns, state, memories)
        return state, (Memory(single=count + 1), memories), info

    def communication(state, number=0):
        return stages[number % len(stages)].communication(state, number // len(stages))

    turns = len(stages) * math.lcm(*(stage.turns for stage in stages))
    anchored = any(stage.anchored for stage in stages)
    return Stage(init, apply, steps[0], communication, anchored, turns)


def join(infos: list[Info], concatenate: Callable = jnp.concatenate) -> Info:
    """One report of several, by name one after another."""
    by_name = lambda reports: {
        name: values[0] if len(values) == 1 else concatenate(values)
        for name, values in _collected(reports).items()
    }
    return Info(by_name([i.worker for i in infos]), by_name([i.common for i in infos]))


def _collected(reports: list[dict[str, Leaf]]) -> dict[str, list[Leaf]]:
    found: dict[str, list[Leaf]] = {}
    for report in reports:
        for name, values in report.items():
            found.setdefault(name, []).append(values)
    return found
