"""The compiled round: a method, a layout of workers and a mesh made into `state, info =
round_fn(state, batches)`."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxlocal.communication import accounting
from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel import collectives
from jaxlocal.parallel import sharding as placing
from jaxlocal.parallel.collectives import over_mesh
from jaxlocal.parallel.layout import AXES, MODEL, SINGLE, STACKED, Layout
from jaxlocal.parallel.mesh import local_rows, make_mesh, place, place_rows, wait_on_cpu_processes
from jaxlocal.parallel.pool import check_indices, pool_size
from jaxlocal.stages.compose import join, repeat
from jaxlocal.stages.sync import NOTHING
from jaxlocal.training.state import States, specs_of
from jaxlocal.types import Collective, Context, Info, MessageBits, Method, Stage, TrainState, Tree

BATCHES = P(None, *AXES)
INFO = Info(worker=BATCHES, common=P())
CONTEXT = Context(STACKED, STACKED, STACKED, STACKED, SINGLE)


class RoundFn:
    """A method's round, compiled: `state, info = round_fn(state, batches)`.

    The batches' leaves are [H, hubs, workers_per_hub, ...]; their H, a multiple of `inner.steps`,
    is the length of the round. H may change from round to round: the round runs in chunks of powers
    of four, so that all H up to some H_max take ⌊log₄ H_max⌋ + 2 compilations at most. The state is
    donated: use the one that comes back.

    Args:
      method: the method.
      layout: the workers.
      mesh: of axes ('hubs', 'workers'), as `make_mesh` gives it; by default as many of the devices
        as the layout divides over. On a last axis 'model' every worker is split over several. It
        may span processes (`jax.distributed`): each then makes the same calls. Batches are the same
        host arrays in all of them, of which each moves the rows of its `local_workers`; or
        `local_batches`, where it holds no others.
      data: a pool of examples, a tree of arrays [examples, ...], kept whole on every device.
        Batches are then indices into it, which travel instead of the examples.
      max_chunk: the most steps that are dispatched at once; bounds the memory for batches.
      sharding: how a worker is split over 'model': a rule of `jaxlocal.sharding`; by default
        `fsdp`. The examples of its batch, dimension 3, are split too where they divide.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.25))
    >>> round_fn = jaxlocal.RoundFn(method, Layout(workers_per_hub=2))
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
        if method.outer.steps % method.inner.steps:
            raise ConfigurationError(
                f"a round's end of {method.outer.steps} steps is no multiple of the "
                f"{method.inner.steps} of its inner stage"
            )
        if method.inner.turns > 1:
            raise ConfigurationError(
                f"an inner stage says the same at every apply, and this one something else in each "
                f"of {method.inner.turns} turns; repeat it so often, or let it end rounds"
            )
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
        """The state before the first step: every worker starts from the same parameters.

        Args:
          params: one model's parameters; they stay the caller's own.
          key: a typed root key, `jax.random.key(seed)`.
          model_state: what a model keeps besides its parameters; {} if none.
        """
        self.stage_bits(self.shapes(params, model_state))  # checks that the mixers fit the layout
        return self._states.init(params, key, model_state)

    def shapes(self, params: Tree, model_state: Tree = None) -> TrainState:
        """The shapes, dtypes and shardings of the state that `init` makes, of parameters or their
        shapes."""
        return self._states.shapes(params, model_state)

    def __call__(self, state: TrainState, batches: Tree) -> tuple[TrainState, Info]:
        """One whole round: H steps and what ends the round, which may take the last of them."""
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
        """Some steps of a round without what ends it; cut anywhere between two inner stages."""
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
        """What ends a round; the batches are those of the steps that it takes, if any."""
        outer = self.method.outer
        if outer is NOTHING:
            return state, Info()
        if outer.steps and (steps := self._steps_of(batches)) != outer.steps:
            raise ConfigurationError(
                f"the end of a round takes {outer.steps} steps, got batches of {steps}"
            )
        placed = self._placed(batches) if outer.steps else ()
        return wait_on_cpu_processes(
            self.mesh, self._program("outer", state)(state, placed, self.context)
        )

    def chunks(self, steps: int) -> Iterator[int]:
        """The sizes, in steps, in which so many steps are dispatched: descending powers of four.

        Powers of inner stages. A dispatch costs little and a compilation much: fours, not twos.
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
        """What a call takes, of host arrays [H, local_workers, ...] with the rows of this process
        alone."""
        return place_rows(batches, self.mesh, self.layout.shape, axis=1)

    def mean(self, state: TrainState) -> tuple[Tree, Tree]:
        """The average model u = Σ a_i x_i, and the average model state; leaves [...]."""
        model = (state.params, state.model_state)
        return wait_on_cpu_processes(
            self.mesh, self._measure(collectives.mean)(model, self.context)
        )

    def consensus_distance(self, state: TrainState) -> jax.Array:
        """√(Σ a_i ‖x_i − u‖²) of the workers' models now."""
        distance = self._measure(collectives.consensus_distance)(state.params, self.context)
        return wait_on_cpu_processes(self.mesh, distance)

    def stage_bits(self, state: TrainState, number: int = 0) -> tuple[MessageBits, MessageBits]:
        """The messages of one inner stage and of the end of the number-th round, from 0; a state or
        its shapes."""
        inner, outer = self.method.inner, self.method.outer
        told = inner.communication(state), outer.communication(state, number)
        return accounting.message_bits(told[0], self.layout), accounting.message_bits(
            told[1], self.layout
        )

    def message_bits(self, state: TrainState, steps: int, rounds: int) -> MessageBits:
        """What is said in so many steps, in which so many rounds end; a state or its shapes."""
        inner, outer = self.method.inner, self.method.outer
        times, turns = (steps - rounds * outer.steps) // inner.steps, outer.turns
        total = MessageBits().plus(self.stage_bits(state)[0], times)
        for turn in range(min(turns, rounds)):
            total = total.plus(self.stage_bits(state, turn)[1], len(range(turn, rounds, turns)))
        return total

    def collectives(self, state: TrainState, steps: int, number: int = 0) -> list[Collective]:
        """The collectives between devices in the number-th round, of so many steps; a state or its
        shapes."""
        inner, outer = self.method.inner, self.method.outer
        times = (steps - outer.steps) // inner.steps
        told = [one._replace(times=one.times * times) for one in inner.communication(state)]
        return accounting.collectives(
            [*told, *outer.communication(state, number)], self.layout, self.mesh.shape
        )

    def lower(self, state: TrainState, batches: Tree) -> list[tuple[int, Any]]:
        """The programs of a round, each with how often the round runs it: lowered, not compiled,
        as `jax.jit(f).lower` gives them; of a state and batches or their shapes."""
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
        shape = lambda x: jax.ShapeDtypeStruct((steps, *x.shape[1:]), x.dtype)
        shapes = jax.tree.map(shape, batches)
        placed = placing.with_shardings(shapes, self._batch_shardings(shapes))
        return self._program(which, state).lower(state, placed, self.context)

    def _measure(self, fn: Any):
        if fn not in self._programs:
            self._programs[fn] = jax.jit(over_mesh(fn, self.mesh, (STACKED, CONTEXT), P()))
        return self._programs[fn]

    def _program(self, which: int | str, state: TrainState):
        if which not in self._programs:
            outer = which == "outer"
            stage = self.method.outer if outer else repeat(self.method.inner, int(which))
            self._programs[which] = _compile(
                stage, self.mesh, specs_of(state), 1 if outer else 0, self._states.held
            )
        return self._programs[which]

    def _steps_of(self, batches: Tree) -> int:
        leading = {jnp.shape(x)[:3] for x in jax.tree.leaves(batches)}
        if len(leading) != 1 or next(iter(leading))[1:] != self.layout.shape:
            raise ConfigurationError(
                f"batches must lead with [steps, {self.layout.hubs} hubs, "
                f"{self.layout.workers_per_hub} workers], "
                f"got leading shapes {sorted(leading)}"
            )
        steps = next(iter(leading))[0]
        if steps % self.method.inner.steps or not steps:
            raise ConfigurationError(
                f"a round of {steps} steps is not a positive multiple of the "
                f"{self.method.inner.steps} of its inner stage"
            )
        if self._examples is not None:
            check_indices(batches, self._examples)
        return steps

    def _batch_shardings(self, batches: Tree) -> Tree:
        return placing.named_shardings(self.mesh, placing.batch_specs(self.mesh, BATCHES, batches))

    def _placed(self, batches: Tree) -> Tree:
        return place(batches, self._batch_shardings(batches))


def check_length(method: Method, steps: int) -> None:
    """Whether a round has steps before its end begins."""
    if steps <= method.outer.steps:
        raise ConfigurationError(
            f"a round of H = {steps} is too short for a synchronisation that runs beside its last "
            f"τ = {method.outer.steps} steps"
        )


def _compile(stage: Stage, mesh: Mesh, specs: TrainState, part: int, held: Any):
    """The stage as one program on the state; `part` says which of the two memories is its own."""

    def run(state, batches, context):
        memories = list(state.memory)
        state, memories[part], info = stage.apply(
            state._replace(memory=()), memories[part], batches, context
        )
        return state._replace(memory=tuple(memories)), info

    mapped = over_mesh(run, mesh, (specs, BATCHES, CONTEXT), (specs, INFO))

    def program(state, batches, context):
        state, info = mapped(state, batches, context)
        return held(state), info

    return jax.jit(program, donate_argnums=0)


def _concatenate(infos: list[Info]) -> Info:
    """One report of several dispatches; joined on the host, where it takes no compilation, if it
    lies in this process."""
    here = lambda x: not isinstance(x, jax.Array) or x.is_fully_addressable
    leaves = jax.tree.leaves(infos)
    if any(isinstance(x, jax.core.Tracer) for x in leaves) or not all(map(here, leaves)):
        return join(infos)
    return join(infos, lambda parts: np.concatenate([np.asarray(p) for p in parts]))
