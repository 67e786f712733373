"""Stages made of stages: repeated, one after another, or in turn."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.errors import ConfigurationError, check_integer
from jaxlocal.parallel.layout import AXES
from jaxlocal.types import Info, Leaf, Memory, Stage


class AnySteps:
    """The `apply` of a stage of one step that can also take several.

    Where steps send nothing, each worker can take all of them before the next worker begins, which
    keeps one model in the cache instead of all. `repeat` then leaves the repetitions to it.

    Args:
      apply: `apply(state, memory, batches, context, steps)`.
      averaged: `averaged(state, batches, context, steps, leaves)` takes them from a state in which
        some leaves are the same on all workers, [1, 1, ...], and gives the `Averaged` workers.
    """

    def __init__(self, apply: Callable, averaged: Callable) -> None:
        self.apply, self.averaged = apply, averaged

    def __call__(self, *arguments: Any) -> Any:
        return self.apply(*arguments, steps=1)

    def repeated(self, steps: int) -> Callable:
        """The function that takes so many steps."""
        return partial(self.apply, steps=steps)


class OfAverage:
    """The `apply` of a stage that needs of the workers no more than their average by weight.

    It marks the function, since a stage may be given another one by `_replace`.

    Args:
      apply: as in `Stage`.
      common: `common(state)` tells which leaves of (params, opt_state, model_state) are the same on
        all workers after the stage, as trees of bools, or None; the others stay as they are.
    """

    def __init__(self, apply: Callable, common: Callable) -> None:
        self._apply, self.common = apply, common

    def __call__(self, *arguments: Any) -> Any:
        return self._apply(*arguments)


class TurnMemory(NamedTuple):
    """The memory of stages that are applied in turn."""

    applied: Memory  # single: int32 [], how often one of them has been applied
    stages: tuple  # memory of each


def repeat(stage: Stage, times: int) -> Stage:
    """Repeat a stage in one loop.

    The result is the same to the bit however the repetitions are split. Where a stage sends nothing
    and workers run one by one, a worker repeats it before the next one begins.

    Args:
      stage: any stage.
      times: how often, at least 1.

    Returns:
      A stage of `times * stage.steps` steps.

    Raises:
      ConfigurationError: fewer than one repetition.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> repeat(jaxlocal.stages.local_step(grad_fn, optax.sgd(0.1)), 8).steps
    8
    """
    _check_stages(stage)
    check_integer("the repetitions of a stage", times)

    def apply(state, memory, batches, context):
        split = jax.tree.map(lambda b: b.reshape((times, stage.steps) + b.shape[1:]), batches)

        def body(carry, batch):
            state, memory = carry
            state, memory, info = stage.apply(state, memory, batch, context)
            return (state, memory), info

        (state, memory), info = lax.scan(body, (state, memory), split, length=times)
        return state, memory, jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), info)

    def communication(state, number=0):
        applications = lambda turn: len(range(turn, times, stage.turns))
        return [
            message._replace(times=message.times * applications(turn))
            for turn in range(min(times, stage.turns))
            for message in stage.communication(state, number * times + turn)
        ]

    turns = stage.turns // math.gcd(stage.turns, times)
    apply = stage.apply.repeated(times) if isinstance(stage.apply, AnySteps) else apply
    steps = times * stage.steps
    return Stage(stage.init, apply, steps, communication, stage.anchored, turns, stage.alike)


def sequence(*stages: Stage) -> Stage:
    """Apply stages one after another; an empty sequence does nothing.

    Their reports are joined by name.

    Args:
      *stages: any stages, which may take different steps.

    Returns:
      A stage of the sum of their steps.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> step = jaxlocal.stages.local_step(grad_fn, optax.sgd(0.1))
    >>> sequence(step, jaxlocal.stages.sync(jaxlocal.mixing.mean()), step).steps
    2
    """
    _check_stages(*stages)

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
        return [message for stage in stages for message in stage.communication(state, number)]

    steps = sum(stage.steps for stage in stages)
    anchored = any(stage.anchored for stage in stages)
    turns = math.lcm(*(stage.turns for stage in stages))
    applies = [stage.apply for stage in stages if isinstance(stage.apply, OfAverage)]
    if stages and len(applies) == len(stages):
        apply = OfAverage(apply, _common_after(applies))
    return Stage(init, apply, steps, communication, anchored, turns, common_axes(*stages))


def in_turn(*stages: Stage) -> Stage:
    """Apply one of the stages at a time: the first, then the second, and so on, in a cycle.

    One program holds all of them, as the branches of a `lax.switch`; each has its own memory.

    Args:
      *stages: stages of the same steps.

    Returns:
      A stage of the steps of one of them.

    Raises:
      ConfigurationError: stages of different steps.

    >>> import jaxlocal
    >>> in_turn(*[jaxlocal.stages.sync(jaxlocal.mixing.mean())] * 3).turns
    3
    """
    _check_stages(*stages)
    steps = sorted({stage.steps for stage in stages})
    if len(steps) != 1:
        raise ConfigurationError(f"stages that take turns must take the same steps, got {steps}")

    def init(state):
        memories = tuple(stage.init(state) for stage in stages)
        return TurnMemory(Memory(single=jnp.int32(0)), memories)

    def apply(state, memory, batches, context):
        count = memory.applied.single

        def turn(number):
            def run(state, memories):
                own = list(memories)
                state, own[number], info = stages[number].apply(
                    state, own[number], batches, context
                )
                return state, tuple(own), info

            return run

        turns = [turn(number) for number in range(len(stages))]
        state, memories, info = lax.switch(count % len(stages), turns, state, memory.stages)
        return state, TurnMemory(Memory(single=count + 1), memories), info

    def communication(state, number=0):
        return stages[number % len(stages)].communication(state, number // len(stages))

    turns = len(stages) * math.lcm(*(stage.turns for stage in stages))
    anchored = any(stage.anchored for stage in stages)
    return Stage(init, apply, steps[0], communication, anchored, turns, common_axes(*stages))


def common_axes(*stages: Stage) -> tuple[str, ...] | None:
    """The mesh axes along which the workers take the same optimizer step in all of the stages."""
    alike = [stage.alike for stage in stages if stage.alike is not None]
    return tuple(axis for axis in AXES if all(axis in axes for axes in alike)) if alike else None


def join(infos: list[Info], concatenate: Callable = jnp.concatenate) -> Info:
    """Join several reports: the values of each name are concatenated."""
    by_name = lambda reports: {
        name: values[0] if len(values) == 1 else concatenate(values)
        for name, values in _collected(reports).items()
    }
    return Info(by_name([i.worker for i in infos]), by_name([i.common for i in infos]))


def _common_after(applies: list[OfAverage]) -> Callable:
    """What is the same on all workers after stages of which the first makes it so."""

    def common(state):
        marks = [apply.common(state) for apply in applies]
        if marks[0] is None or not all(jax.tree.leaves(marks[0][0])):
            return None
        return jax.tree.map(lambda *marks: any(marks), *marks)

    return common


def _check_stages(*stages: Any) -> None:
    for stage in stages:
        if not isinstance(stage, Stage):
            raise ConfigurationError(f"a stage is one of jaxlocal.stages, got {stage!r}")


def _collected(reports: list[dict[str, Leaf]]) -> dict[str, list[Leaf]]:
    found: dict[str, list[Leaf]] = {}
    for report in reports:
        for name, values in report.items():
            found.setdefault(name, []).append(values)
    return found


NOTHING = sequence()  # the end of a round at which nothing is sent
