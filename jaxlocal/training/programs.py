"""Stages as compiled programs on a train state."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel import sharding as placing
from jaxlocal.parallel.collectives import over_mesh
from jaxlocal.parallel.layout import AXES, CONTEXT
from jaxlocal.parallel.leaves import path_name
from jaxlocal.parallel.mesh import jit_on, on_mesh, place, wait_on_cpu_processes
from jaxlocal.stages.averaged_workers import parts_of
from jaxlocal.stages.compose import AnySteps, join
from jaxlocal.training.ahead import Ahead, Compiling
from jaxlocal.training.bodies import body
from jaxlocal.training.common_state import CommonState, full_shapes, held
from jaxlocal.training.pieces import Piece
from jaxlocal.training.state import States, specs_of, specs_of_parts
from jaxlocal.types import Context, Info, Method, TrainState, Tree

BATCHES = P(None, *AXES)
INFO = Info(worker=BATCHES, common=P())


class Consuming:
    """A program whose state has another form than the one it returns, so that no buffer is used
    again; it deletes the state as a donation does."""

    def __init__(self, program: Any) -> None:
        self._program, self.lower = program, program.lower

    def __call__(self, state: TrainState, *arguments: Tree) -> Any:
        done = self._program(state, *arguments)
        for x in jax.tree.leaves(state):
            if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
                x.delete()
        return done


class OnModels:
    """A function of the workers' models over a mesh, compiled for each form in which they are held.

    Args:
      fn: `fn(models, *arguments)`, of leaves [d, n, ...], or [1, 1, ...] where workers are alike.
      mesh: of the workers.
      specs: of the other arguments.
      out_specs: of the result.
    """

    def __init__(self, fn: Callable, mesh: Mesh, specs: tuple, out_specs: Any) -> None:
        self._fn, self._mesh, self._specs, self._out_specs = fn, mesh, specs, out_specs
        self._made: dict[Any, Any] = {}

    def __call__(self, models: Tree, *arguments: Tree) -> Tree:
        return wait_on_cpu_processes(self._mesh, self._get(models)(models, *arguments))

    def lower(self, models: Tree, *arguments: Tree) -> Any:
        """As that of `jax.jit`."""
        return self._get(models).lower(models, *arguments)

    def _get(self, models: Tree) -> jit_on:
        form = specs_of_parts(models)
        key = jax.tree.structure(models), tuple(jax.tree.leaves(form))
        if key not in self._made:
            mapped = over_mesh(self._fn, self._mesh, (form, *self._specs), self._out_specs)
            self._made[key] = jit_on(self._mesh, mapped)
        return self._made[key]


class Programs:
    """The programs of a method on a mesh: each is made when it is first needed, and kept."""

    def __init__(self, method: Method, mesh: Mesh, context: Context, states: States) -> None:
        self._mesh, self._context, self._states = mesh, context, states
        # One trace serves the programs of all numbers of inner stages; it is not in what they run.
        # An apply of any number of steps keeps the trace of one of them itself.
        kept = isinstance(method.inner.apply, AnySteps)
        inlined = method.inner.apply if kept else jax.jit(method.inner.apply, inline=True)
        self._method = method._replace(inner=method.inner._replace(apply=inlined))
        self._made: dict[Any, Any] = {}
        self._compiling = Compiling()

    def place(self, batches: Tree) -> Tree:
        """Batches on the devices of the mesh."""
        return place(batches, self._shardings(batches))

    def measure(self, fn: Callable[[Tree, Context], Tree], models: Tree) -> Tree:
        """A function of all workers' models, whose result is the same on all devices."""
        self._compiling.finished(fn)
        return self._measuring(fn)(models, self._context)

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
        form = _form(piece, state)
        if form not in self._made:
            self._compiling.begin(form, self.lower(piece, state, batches, steps), ahead)

    def measure_ahead(
        self, fn: Callable[[Tree, Context], Tree], models: Tree, ahead: Ahead
    ) -> None:
        """Compile what `measure` calls in a thread; the arrays may be shapes."""
        if fn not in self._made:
            lowered = self._measuring(fn).lower(models, self._context)
            self._compiling.begin(fn, lowered, ahead)

    def get(self, piece: Piece, state: TrainState) -> Any:
        """The program, `program(state, batches, context)`, for states of this form, to call in
        `running`; it donates the state."""
        form = _form(piece, state)
        self._compiling.finished(form)
        if form not in self._made:
            self._made[form] = self._compile(piece, state)
        return self._made[form]

    def _compile(self, piece: Piece, state: TrainState) -> Any:
        leaves = self._states.common_leaves(state)
        after = self._states.at_end(state) if piece.ends else full_shapes(state)
        run = body(self._method, piece, leaves, self._states.grid)
        specs = specs_of(state), BATCHES, CONTEXT
        # That all workers remember the same is not seen in the types of what each remembers.
        typed = isinstance(state, CommonState) == isinstance(after, CommonState) or not piece.ends
        mapped = over_mesh(run, self._mesh, specs, (specs_of(after), INFO), typed)
        if not placing.is_sharded(self._mesh):
            if _sizes(state) == _sizes(after):
                return jax.jit(mapped, donate_argnums=0)
            # What is not written into a donated array is placed as JAX likes, and compiled for.
            places = placing.named_shardings(self._mesh, specs_of(after))
            return Consuming(jax.jit(mapped, out_shardings=(places, None)))

        def constrained(state, batches, context):
            state, info = mapped(state, batches, context)
            return self._states.keep_shardings(state), info

        return jax.jit(constrained, donate_argnums=0)

    def _measuring(self, fn: Callable[[Tree, Context], Tree]) -> OnModels:
        if fn not in self._made:
            self._made[fn] = OnModels(fn, self._mesh, (CONTEXT,), P())
        return self._made[fn]

    def _shardings(self, batches: Tree) -> Tree:
        specs = placing.batch_specs(self._mesh, BATCHES, batches)
        return placing.named_shardings(self._mesh, specs)


def _sizes(state: TrainState) -> list[tuple[int, ...]]:
    return [np.shape(x) for x in jax.tree.leaves(state)]


def _form(piece: Piece, state: TrainState) -> tuple:
    """What tells the programs of pieces apart: those of one piece differ by the tree and the types
    of the model and by what is held once."""
    kind = lambda x: (x.dtype, x.shape[:2] == (1, 1))
    kinds = tuple(map(kind, jax.tree.leaves(parts_of(held(state)))))
    return piece, jax.tree.structure(state), kinds


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
