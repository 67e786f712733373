"""The compiled round: a method, a layout of workers and a mesh made into one function."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxlocal.communication import accounting
from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel import collectives
from jaxlocal.parallel import sharding as placing
from jaxlocal.parallel.layout import CONTEXT, MODEL, STACKED, Layout
from jaxlocal.parallel.mesh import local_rows, make_mesh, place, place_rows, wait_on_cpu_processes
from jaxlocal.parallel.pool import check_indices, pool_size
from jaxlocal.stages.compose import NOTHING, join, repeat
from jaxlocal.training.checks import check_length, check_method, steps_of
from jaxlocal.training.programs import BATCHES, compile_stage, shapes_of_steps
from jaxlocal.training.state import States, specs_of
from jaxlocal.types import Collective, Info, MessageBits, Method, TrainState, Tree


class RoundFn:
    """Compile the round of a method: `state, info = round_fn(state, batches)`.

    The leaves of batches are [H, hubs, workers_per_hub, ...]; their H, a multiple of
    `method.inner.steps`, is the length of the round. H may change from round to round: the round
    runs in chunks of powers of four, so that all H up to H_max take at most ⌊log₄ H_max⌋ + 2
    compilations. The state is donated: use the one that is returned.

    Args:
      method: what the workers do, as `jaxlocal.local_sgd` and the others make it.
      layout: the workers, their weights and rates.
      mesh: of axes ('hubs', 'workers'), as `make_mesh` gives it; by default as many of the devices
        as the layout divides over. On a last axis 'model' every worker is sharded over several
        devices. A mesh may span processes (`jax.distributed`): each process then makes the same
        calls, with the same host arrays as batches, of which it moves the rows of its
        `local_workers`, or with `local_batches` of those rows alone.
      data: a pool of examples, a tree of arrays [examples, ...], held whole on every device.
        Batches are then integer indices into it, int32 [H, hubs, workers_per_hub, batch].
      max_chunk: the most steps that are dispatched at once; bounds the memory for batches.
      sharding: how a worker is sharded over 'model': a rule of `jaxlocal.sharding`; by default
        `fsdp`. The examples of its batch, dimension 3, are sharded too where they divide.

    Raises:
      ConfigurationError: the method, the layout and the mesh do not fit together.

    >>> import jax.numpy as jnp, jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.25), period=4)
    >>> round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
    >>> state = round_fn.init(jnp.zeros(()), jax.random.key(0))
    >>> state, info = round_fn(state, jnp.ones((4, 1, 2)))  # four steps, one hub, two workers
    >>> state.params, info.worker["loss"][:, 0, 0]
    (Array([[0.9375, 0.9375]], dtype=float32),
     Array([1. , 0.25 , 0.0625 , 0.015625], dtype=float32))
    """

    def __init__(
        self,
        method: Method,
        layout: Layout,
        mesh: Mesh | None = None,
        data: Tree = (),
        max_chunk: int = 1024,
        sharding: placing.Rule | None = None,
    ):
        check_method(method, layout)
        self.method = method
        self.layout = layout
        self.mesh = mesh if mesh is not None else make_mesh(layout)
        rule = sharding or placing.fsdp(self.mesh.shape.get(MODEL, 1))
        self._states = States(method, layout, self.mesh, rule)
        self.local_workers = local_rows(self.mesh, layout.shape)
        if not self.local_workers.size:
            raise ConfigurationError(
                f"process {jax.process_index()} has no device in the mesh of {self.mesh.size}"
            )
        self._examples = pool_size(data)
        self.context = place(layout.context(data), placing.named_shardings(self.mesh, CONTEXT))
        self._most = max(1, max_chunk // method.inner.steps)
        self._programs: dict[Any, Any] = {}

    def init(self, params: Tree, key: jax.Array, model_state: Tree = None) -> TrainState:
        """Make the state before the first step: every worker starts from the same parameters.

        Args:
          params: the parameters of one model, which stay the caller's.
          key: a typed root key, `jax.random.key(seed)`.
          model_state: the model state of one model, such as batch statistics; {} if there is none.
        """
        self.stage_bits(self.shapes(params, model_state))  # checks that the mixers fit the layout
        return self._states.init(params, key, model_state)

    def shapes(self, params: Tree, model_state: Tree = None) -> TrainState:
        """Shapes, dtypes and shardings of the state that `init` makes; parameters may be shapes."""
        return self._states.shapes(params, model_state)

    def __call__(self, state: TrainState, batches: Tree) -> tuple[TrainState, Info]:
        """Run one round: H steps and its end, which may take the last of the steps.

        Args:
          state: as `init` or the round before gave it; donated.
          batches: leaves [H, hubs, workers_per_hub, ...].

        Returns:
          The state after the round, and what the stages report: `info.worker["loss"]` is [H, hubs,
          workers_per_hub].
        """
        steps, own, rest = self._steps_of(batches), batches, ()
        if ending := self.method.outer.steps:
            check_length(self.method, steps)
            own, rest = (
                jax.tree.map(lambda b, p=part: b[p], batches)
                for part in (slice(steps - ending), slice(steps - ending, None))
            )
        state, info = self.local_steps(state, own)
        state, last = self.end_round(state, rest)
        return state, _concatenate([info, last])

    def local_steps(self, state: TrainState, batches: Tree) -> tuple[TrainState, Info]:
        """Run some steps of a round without its end; a cut may lie between any two inner stages."""
        steps, infos, start = self._steps_of(batches), [], 0
        for size in self.chunks(steps):
            part = batches
            if size < steps:
                part = jax.tree.map(lambda b, a=start, n=size: b[a : a + n], batches)
            program = self._program(size // self.method.inner.steps, state)
            done = program(state, self._placed(part), self.context)
            state, info = wait_on_cpu_processes(self.mesh, done)
            infos.append(info)
            start += size
        return state, _concatenate(infos)

    def end_round(self, state: TrainState, batches: Tree = ()) -> tuple[TrainState, Info]:
        """Run the end of a round; the batches are those of the steps that it takes, if any."""
        outer = self.method.outer
        if outer is NOTHING:
            return state, Info()
        if outer.steps and (steps := self._steps_of(batches)) != outer.steps:
            raise ConfigurationError(
                f"the end of a round takes {outer.steps} steps, got batches of {steps}"
            )
        placed = self._placed(batches) if outer.steps else ()
        done = self._program("outer", state)(state, placed, self.context)
        return wait_on_cpu_processes(self.mesh, done)

    def chunks(self, steps: int) -> Iterator[int]:
        """The sizes in which steps are dispatched: powers of four of inner stages, descending.

        A dispatch costs little and a compilation much: powers of four need half as many
        compilations as powers of two.
        """
        times, size = steps // self.method.inner.steps, 1
        while 4 * size <= min(times, self._most):
            size *= 4
        while times:
            while size > times:
                size //= 4
            yield size * self.method.inner.steps
            times -= size

    def local_batches(self, batches: Tree) -> Tree:
        """Make global batches of host arrays [H, local_workers, ...], the rows of this process."""
        return place_rows(batches, self.mesh, self.layout.shape, axis=1)

    def mean(self, state: TrainState) -> tuple[Tree, Tree]:
        """The average model u = Σ a_i x_i, and the average model state; leaves [...]."""
        model = (state.params, state.model_state)
        return wait_on_cpu_processes(
            self.mesh, self._measure(collectives.mean)(model, self.context)
        )

    def consensus_distance(self, state: TrainState) -> jax.Array:
        """The consensus distance √(Σ a_i ‖x_i − u‖²) of the workers' models now."""
        distance = self._measure(collectives.consensus_distance)(state.params, self.context)
        return wait_on_cpu_processes(self.mesh, distance)

    def stage_bits(self, state: TrainState, number: int = 0) -> tuple[MessageBits, MessageBits]:
        """Bits sent in one inner stage, and at the end of the number-th round, counted from 0.

        The state may be given as its shapes.
        """
        inner, outer = self.method.inner, self.method.outer
        messages = inner.communication(state), outer.communication(state, number)
        return (
            accounting.message_bits(messages[0], self.layout),
            accounting.message_bits(messages[1], self.layout),
        )

    def message_bits(self, state: TrainState, steps: int, rounds: int) -> MessageBits:
        """Bits that one worker and one hub send in some steps, in which `rounds` rounds end.

        The state may be given as its shapes.
        """
        inner, outer = self.method.inner, self.method.outer
        times, turns = (steps - rounds * outer.steps) // inner.steps, outer.turns
        total = MessageBits().plus(self.stage_bits(state)[0], times)
        for turn in range(min(turns, rounds)):
            total = total.plus(self.stage_bits(state, turn)[1], len(range(turn, rounds, turns)))
        return total

    def collectives(self, state: TrainState, steps: int, number: int = 0) -> list[Collective]:
        """The collectives between devices in the number-th round, of `steps` steps.

        The state may be given as its shapes.
        """
        inner, outer = self.method.inner, self.method.outer
        times = (steps - outer.steps) // inner.steps
        messages = [m._replace(times=m.times * times) for m in inner.communication(state)]
        messages += outer.communication(state, number)
        return accounting.collectives(messages, self.layout, self.mesh.shape)

    def lower(self, state: TrainState, batches: Tree) -> list[tuple[int, Any]]:
        """Lower the programs of a round without compiling them, each with how often it runs.

        Args:
          state, batches: of one round, or their shapes.

        Returns:
          (times, lowered) pairs; `lowered` is what `jax.jit(f).lower` gives.
        """
        ending = self.method.outer.steps
        sizes = Counter(self.chunks(self._steps_of(batches) - ending))
        lowered = [
            (times, self._lowered(size // self.method.inner.steps, state, batches, size))
            for size, times in sizes.items()
        ]
        if self.method.outer is not NOTHING:
            own = batches if ending else ()
            lowered.append((1, self._lowered("outer", state, own, ending)))
        return lowered

    def _lowered(self, which: int | str, state: TrainState, batches: Tree, steps: int):
        shapes = shapes_of_steps(batches, steps)
        placed = placing.with_shardings(shapes, self._batch_shardings(shapes))
        return self._program(which, state).lower(state, placed, self.context)

    def _measure(self, fn: Any):
        if fn not in self._programs:
            over_mesh = collectives.over_mesh(fn, self.mesh, (STACKED, CONTEXT), P())
            self._programs[fn] = jax.jit(over_mesh)
        return self._programs[fn]

    def _program(self, which: int | str, state: TrainState):
        """The program of the end of a round, or of `which` inner stages."""
        if which not in self._programs:
            outer = which == "outer"
            stage = self.method.outer if outer else repeat(self.method.inner, int(which))
            part, specs = "outer" if outer else "inner", specs_of(state)
            keep = self._states.keep_shardings
            self._programs[which] = compile_stage(stage, part, self.mesh, specs, keep)
        return self._programs[which]

    def _steps_of(self, batches: Tree) -> int:
        steps = steps_of(batches, self.method, self.layout)
        if self._examples is not None:
            check_indices(batches, self._examples)
        return steps

    def _batch_shardings(self, batches: Tree) -> Tree:
        specs = placing.batch_specs(self.mesh, BATCHES, batches)
        return placing.named_shardings(self.mesh, specs)

    def _placed(self, batches: Tree) -> Tree:
        return place(batches, self._batch_shardings(batches))


def _concatenate(infos: list[Info]) -> Info:
    """One report of several dispatches; joined on the host, without a compilation, where all of it
    lies in this process."""
    here = lambda x: not isinstance(x, jax.Array) or x.is_fully_addressable
    leaves = jax.tree.leaves(infos)
    if any(isinstance(x, jax.core.Tracer) for x in leaves) or not all(map(here, leaves)):
        return join(infos)
    return join(infos, lambda parts: np.concatenate([np.asarray(p) for p in parts]))
