"""Stages made of stages."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.errors import ConfigurationError
from jaxlocal.types import Info, Messages, Stage, Tree


def repeat(stage: Stage, times: int) -> Stage:
    """The stage, `times` times over, in one `lax.scan`.

    However a number of times is split, the bits are the same.
    """
    if times < 1:
        raise ConfigurationError(f"a stage must be repeated at least once, got {times}")

    def apply(state, memory, batches, world):
        split = jax.tree.map(lambda b: b.reshape((times, stage.ticks) + b.shape[1:]), batches)

        def body(carry, batch):
            state, memory = carry
            state, memory, info = stage.apply(state, memory, batch, world)
            return (state, memory), info

        (state, memory), info = lax.scan(body, (state, memory), split, length=times)
        return state, memory, jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), info)

    def traffic(state, layout):
        return Messages().plus(stage.traffic(state, layout), times)

    return stage._replace(apply=apply, ticks=times * stage.ticks, traffic=traffic)


def sequence(*stages: Stage) -> Stage:
    """The stages one after another; an empty sequence does nothing.

    What they report is joined by name.
    """

    def init(state):
        return tuple(stage.init(state) for stage in stages)

    def apply(state, memory, batches, world):
        memories, infos, start = [], [], 0
        for stage, own in zip(stages, memory, strict=True):
            part = jax.tree.map(lambda b, a=start, n=stage.ticks: b[a : a + n], batches)
            state, own, info = stage.apply(state, own, part, world)
            memories.append(own)
            infos.append(info)
            start += stage.ticks
        return (
            state,
            tuple(memories),
            Info(_join([i.worker for i in infos]), _join([i.common for i in infos])),
        )

    def traffic(state, layout):
        total = Messages()
        for stage in stages:
            total = total.plus(stage.traffic(state, layout))
        return total

    return Stage(
        init, apply, sum(s.ticks for s in stages), traffic, any(s.anchored for s in stages)
    )


def _join(reports: list[dict[str, Tree]]) -> dict[str, Tree]:
    names = dict.fromkeys(name for report in reports for name in report)
    return {name: jnp.concatenate([r[name] for r in reports if name in r]) for name in names}
