"""Stages as compiled programs on a train state."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxlocal.parallel.collectives import over_mesh
from jaxlocal.parallel.layout import AXES, CONTEXT
from jaxlocal.parallel.sharding import is_sharded
from jaxlocal.types import Info, Stage, TrainState, Tree

BATCHES = P(None, *AXES)
INFO = Info(worker=BATCHES, common=P())


def compile_stage(
    stage: Stage,
    memory: str,
    mesh: Mesh,
    specs: TrainState,
    keep_shardings: Callable[[TrainState], TrainState],
) -> Any:
    """Compile a stage as `program(state, batches, context)` → (state, info); donates the state.

    Args:
      memory: which part of the state's memory belongs to the stage, "inner" or "outer".
      specs: how the state is spread over the mesh, a prefix of its tree.
      keep_shardings: constrains a state to its shardings, where workers are sharded.
    """

    def run(state, batches, context):
        own = getattr(state.memory, memory)
        after, own, info = stage.apply(state._replace(memory=()), own, batches, context)
        return after._replace(memory=state.memory._replace(**{memory: own})), info

    mapped = over_mesh(run, mesh, (specs, BATCHES, CONTEXT), (specs, INFO))
    if not is_sharded(mesh):
        return jax.jit(mapped, donate_argnums=0)

    def constrained(state, batches, context):
        state, info = mapped(state, batches, context)
        return keep_shardings(state), info

    return jax.jit(constrained, donate_argnums=0)


def shapes_of_steps(batches: Tree, steps: int) -> Tree:
    """The shapes of `steps` steps of batches."""
    shape = lambda x: jax.ShapeDtypeStruct((steps, *x.shape[1:]), x.dtype)
    return jax.tree.map(shape, batches)
