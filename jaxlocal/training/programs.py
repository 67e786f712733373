"""Stages as compiled programs on a train state."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel import sharding as placing
from jaxlocal.parallel.collectives import over_mesh
from jaxlocal.parallel.layout import AXES, CONTEXT, STACKED
from jaxlocal.parallel.leaves import path_name
from jaxlocal.parallel.mesh import jit_on, on_mesh, place, wait_on_cpu_processes
from jaxlocal.stages.compose import AnySteps, join, repeat
from jaxlocal.training.ahead import Ahead, Compiling
from jaxlocal.training.pieces import Piece, cut
from jaxlocal.training.state import specs_of
from jaxlocal.types import Context, Info, Method, Stage, TrainState, Tree

BATCHES = P(None, *AXES)
INFO = Info(worker=BATCHES, common=P())


class Programs:
    """The programs of a method on a mesh: each is made when it is first needed, and kept."""

    def __init__(
        self,
        method: Method,
        mesh: Mesh,
        context: Context,
        keep_shardings: Callable[[TrainState], TrainState],
    ) -> None:
        self._method, self._mesh, self._context = method, mesh, context
        self._keep_shardings = keep_shardings
        # One trace serves the programs of all numbers of inner stages; it is not in what they run.
        # An apply of any number of steps keeps the trace of one of them itself.
        kept = isinstance(method.inner.apply, AnySteps)
        inlined = method.inner.apply if kept else jax.jit(method.inner.apply, inline=True)
        self._inner = method.inner._replace(apply=inlined)
        self._made: dict[Any, Any] = {}
        self._compiling = Compiling()

    def place(self, batches: Tree) -> Tree:
        """Batches on the devices of the mesh."""
        return place(batches, self._shardings(batches))

    def measure(self, fn: Callable[[Tree, Context], Tree], stacked: Tree) -> Tree:
        """A function of all workers' arrays, whose result is the same on all devices."""
        self._compiling.finished(fn)
        return wait_on_cpu_processes(self._mesh, self._measuring(fn)(stacked, self._context))

    def lower(self, piece: Piece, state: TrainState, batches: Tree, steps: int) -> Any:
        """Lower the program of some steps without compiling it; arguments may be shapes."""
        shape = lambda x: jax.ShapeDtypeStruct((steps, *x.shape[1:]), x.dtype)
        shapes = jax.tree.map(shape, batches)
        placed = placing.with_shardings(shapes, self._shardings(shapes))
        with on_mesh(self._mesh):
            return self.get(piece, state).lower(state, placed, self._context)

    def compile_ahead(
        self, piece: Piece, state: TrainState, batches: Tree, steps: int, ahead: Ahead
    ) -> None:
        """Compile the program of some steps in a thread, once; arguments may be shapes."""
        if piece not in self._made:
            self._compiling.begin(piece, self.lower(piece, state, batches, steps), ahead)

    def measure_ahead(
        self, fn: Callable[[Tree, Context], Tree], stacked: Tree, ahead: Ahead
    ) -> None:
        """Compile what `measure` calls in a thread; the arrays may be shapes."""
        if fn not in self._made:
            lowered = self._measuring(fn).lower(stacked, self._context)
            self._compiling.begin(fn, lowered, ahead)

    def get(self, piece: Piece, state: TrainState) -> Any:
        """The program, `program(state, batches, context)`, for states of this form, to call in
        `running`."""
        self._compiling.finished(piece)
        if piece not in self._made:
            parts = [("inner", repeat(self._inner, piece.times))] if piece.times else []
            parts += [("outer", self._method.outer)] if piece.ends else []
            keep = self._keep_shardings
            self._made[piece] = _compile(parts, self._mesh, specs_of(state), keep)
        return self._made[piece]

    def _measuring(self, fn: Callable[[Tree, Context], Tree]) -> jit_on:
        if fn not in self._made:
            mapped = over_mesh(fn, self._mesh, (STACKED, CONTEXT), P())
            self._made[fn] = jit_on(self._mesh, mapped)
        return self._made[fn]

    def _shardings(self, batches: Tree) -> Tree:
        specs = placing.batch_specs(self._mesh, BATCHES, batches)
        return placing.named_shardings(self._mesh, specs)


def _compile(
    parts: list[tuple[str, Stage]],
    mesh: Mesh,
    specs: TrainState,
    keep_shardings: Callable[[TrainState], TrainState],
) -> Any:
    """Compile parts of a round as `program(state, batches, context)` → (state, info); donates the
    state.

    Args:
      parts: stages, each with the part of the state's memory that belongs to it.
      specs: how the state is spread over the mesh, a prefix of its tree.
      keep_shardings: constrains a state to its shardings, where workers are sharded.
    """

    def run(state, batches, context):
        infos: list[Info] = []
        start = 0
        for name, stage in parts:
            # Apart from what follows, a stage has the bits that it has as a program of its own.
            state = jax.tree.map(lax.optimization_barrier, state) if infos else state
            own = cut(batches, start, stage.steps)
            memory = getattr(state.memory, name)
            after, memory, info = stage.apply(state._replace(memory=()), memory, own, context)
            state = after._replace(memory=state.memory._replace(**{name: memory}))
            infos.append(info)
            start += stage.steps
        return state, join(infos)

    mapped = over_mesh(run, mesh, (specs, BATCHES, CONTEXT), (specs, INFO))
    if not placing.is_sharded(mesh):
        return jax.jit(mapped, donate_argnums=0)

    def constrained(state, batches, context):
        state, info = mapped(state, batches, context)
        return keep_shardings(state), info

    return jax.jit(constrained, donate_argnums=0)


@contextlib.contextmanager
def running(mesh: Mesh, state: TrainState) -> Iterator[None]:
    """Run programs of a mesh, and explain what a loss looks up in vain: mostly, the model state was
    forgotten."""
    try:
        with on_mesh(mesh):
            yield
    except KeyError as error:
        paths = jax.tree_util.tree_leaves_with_path(state.model_state)
        names = ", ".join(sorted({path_name(path[:1]) for path, _ in paths}))
        raise ConfigurationError(
            f"the loss or the optimizer looks up {error}, which it is not given; the model state, "
            f"an argument of init, {f'has {names}' if names else 'is empty'}"
        ) from error


def concatenate(infos: list[Info]) -> Info:
    """One report of several dispatches; joined on the host, without a compilation, where all of it
    lies in this process."""
    here = lambda x: not isinstance(x, jax.Array) or x.is_fully_addressable
    leaves = jax.tree.leaves(infos)
    if any(isinstance(x, jax.core.Tracer) for x in leaves) or not all(map(here, leaves)):
        return join(infos)
    return join(infos, lambda parts: np.concatenate([np.asarray(p) for p in parts]))
