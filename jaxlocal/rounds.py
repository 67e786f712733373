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

from jaxlocal import ledger, workers
from jaxlocal import sharding as placing
from jaxlocal.compose import join, repeat
from jaxlocal.errors import ConfigurationError
from jaxlocal.placement import in_step, local_rows, make_mesh, place, place_rows
from jaxlocal.pool import check_indices, pool_size
from jaxlocal.states import States, specs_of
from jaxlocal.syncing import NOTHING
from jaxlocal.types import (
    Collective,
    Info,
    Messages,
    Rounds,
    Stage,
    TrainState,
    Tree,
    World,
)
from jaxlocal.workers import AXES, MODEL, SINGLE, STACKED, Layout, over_mesh

BATCHES = P(None, *AXES)
INFO = Info(worker=BATCHES, common=P())
WORLD = World(STACKED, STACKED, STACKED, STACKED, SINGLE)


class RoundFn:
    """A method's round, compiled: `state, info = round_fn(state, batches)`.

    The batches' leaves are [H, hubs, workers_per_hub, ...]; their H, a multiple of `inner.ticks`,
    is the length of the round. H may change from round to round: the round runs in chunks of powers
    of four, so that all H up to some H_max take ⌊log₄ H_max⌋ + 2 compilations at most. The state is
    donated: use the one that comes back.

    Args:
      rounds: the method.
      layout: the workers.
      mesh: of axes ('hubs', 'workers'), as `make_mesh` gives it; by default as many of the devices
        as the layout divides over. On a last axis 'model' every worker is split over several. It
        may span processes (`jax.distributed`): each then makes the same calls. Batches are the same
        host arrays in all of them, of which each moves the rows of its `local_workers`; or
        `local_batches`, where it holds no others.
      data: a pool of examples, a tree of arrays [examples, ...], kept whole on every device.
        Batches are then indices into it, which travel instead of the examples.
      max_chunk: the most ticks that are dispatched at once; bounds the memory for batches.
      sharding: how a worker is split over 'model': a rule of `jaxlocal.sharding`; by default
        `fsdp`. The examples of its batch, dimension 3, are split too where they divide.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.25))
    >>> round_fn = jaxlocal.RoundFn(method, Layout(workers_per_hub=2))
    >>> state = round_fn.init(jnp.zeros(()), jax.random.key(0))
    >>> state, info = round_fn(state, jnp.ones((4, 1, 2)))  # four ticks, one hub, two workers
    >>> state.params, info.worker["loss"][:, 0, 0]
    (Array([[0.9375, 0.9375]], dtype=float32),
     Array([1. , 0.25 , 0.0625 , 0.015625], dtype=float32))
    """

    def __init__(
        self,
        rounds: Rounds,
        layout: Layout,
        mesh: Mesh | None = None,
        data: Tree = (),
        max_chunk: int = 1024,
        sharding: placing.Rule | None = None,
    ):
        if rounds.outer.ticks % rounds.inner.ticks:
            raise ConfigurationError(
                f"a round's end of {rounds.outer.ticks} ticks is no multiple of the "
                f"{rounds.inner.ticks} of its inner stage"
            )
        if rounds.inner.turns > 1:
            raise ConfigurationError(
                f"an inner stage says the same at every apply, and this one something else in each "
                f"of {rounds.inner.turns} turns; repeat it so often, or let it end rounds"
            )
        self.rounds = rounds
        self.layout = layout
        self.mesh = mesh if mesh is not None else make_mesh(layout)
        rule = sharding or placing.fsdp(self.mesh.shape.get(MODEL, 1))
        self._states = States(rounds, layout, self.mesh, rule)
        self.local_workers = local_rows(self.mesh, layout.shape)
        if not self.local_workers.size:
            raise ConfigurationError(
                f"process {jax.process_index()} has no device in the mesh of {self.mesh.size}"
            )
        self._examples = pool_size(data)
        self.world = place(layout.world(data), placing.on(self.mesh, WORLD))
        self._most = max(1, max_chunk // rounds.inner.ticks)
        self._programs: dict[Any, Any] = {}

    def init(self, params: Tree, key: jax.Array, model_state: Tree = None) -> TrainState:
        """The state before the first tick: every worker starts from the same parameters.

        Args:
          params: one model's parameters; they stay the caller's own.
          key: a typed root key, `jax.random.key(seed)`.
          model_state: what a model keeps besides its parameters; {} if none.
        """
        self.traffic(self.shapes(params, model_state))  # checks that the mixers fit the layout
        return self._states.init(params, key, model_state)

    def shapes(self, params: Tree, model_state: Tree = None) -> TrainState:
        """The shapes, dtypes and shardings of the state that `init` makes, of parameters or their
        shapes."""
        return self._states.shapes(params, model_state)

    def __call__(self, state: TrainState, batches: Tree) -> tuple[TrainState, Info]:
        """One whole round: H ticks and what ends the round, which may take the last of them."""
        ticks, own, rest = self._ticks_of(batches), batches, ()
        if ending := self.rounds.outer.ticks:
            check_length(self.rounds, ticks)
            own, rest = (
                jax.tree.map(lambda b, p=part: b[p], batches)
                for part in (slice(ticks - ending), slice(ticks - ending, None))
            )
        state, info = self.local_steps(state, own)
        state, last = self.end_round(state, rest)
        return state, _concatenate([info, last])

    def local_steps(self, state: TrainState, batches: Tree) -> tuple[TrainState, Info]:
        """Some ticks of a round without what ends it; cut anywhere between two inner stages."""
        ticks, infos, start = self._ticks_of(batches), [], 0
        for size in self.chunks(ticks):
            part = batches
            if size < ticks:
                part = jax.tree.map(lambda b, a=start, n=size: b[a : a + n], batches)
            program = self._program(size // self.rounds.inner.ticks, state)
            done = program(state, self._placed(part), self.world)
            state, info = in_step(self.mesh, done)
            infos.append(info)
            start += size
        return state, _concatenate(infos)

    def end_round(self, state: TrainState, batches: Tree = ()) -> tuple[TrainState, Info]:
        """What ends a round; the batches are those of the ticks that it takes, if any."""
        outer = self.rounds.outer
        if outer is NOTHING:
            return state, Info()
        if outer.ticks and (ticks := self._ticks_of(batches)) != outer.ticks:
            raise ConfigurationError(
                f"the end of a round takes {outer.ticks} ticks, got batches of {ticks}"
            )
        placed = self._placed(batches) if outer.ticks else ()
        return in_step(self.mesh, self._program("outer", state)(state, placed, self.world))

    def chunks(self, ticks: int) -> Iterator[int]:
        """The sizes, in ticks, in which so many ticks are dispatched: descending powers of four.

        Powers of inner stages. A dispatch costs little and a compilation much: fours, not twos.
        """
        times, size = ticks // self.rounds.inner.ticks, 1
        while 4 * size <= min(times, self._most):
            size *= 4
        while times:
            while size > times:
                size //= 4
            yield size * self.rounds.inner.ticks
            times -= size

    def local_batches(self, batches: Tree) -> Tree:
        """What a call takes, of host arrays [H, local_workers, ...] with the rows of this process
        alone."""
        return place_rows(batches, self.mesh, self.layout.shape, axis=1)

    def mean(self, state: TrainState) -> tuple[Tree, Tree]:
        """The average model u = Σ a_i x_i, and the average model state; leaves [...]."""
        model = (state.params, state.model_state)
        return in_step(self.mesh, self._measure(workers.mean)(model, self.world))

    def consensus_distance(self, state: TrainState) -> jax.Array:
        """√(Σ a_i ‖x_i − u‖²) of the workers' models now."""
        distance = self._measure(workers.consensus_distance)(state.params, self.world)
        return in_step(self.mesh, distance)

    def traffic(self, state: TrainState, number: int = 0) -> tuple[Messages, Messages]:
        """The messages of one inner stage and of the end of the number-th round, from 0; a state or
        its shapes."""
        inner, outer = self.rounds.inner, self.rounds.outer
        told = inner.says(state), outer.says(state, number)
        return ledger.messages(told[0], self.layout), ledger.messages(told[1], self.layout)

    def messages(self, state: TrainState, ticks: int, rounds: int) -> Messages:
        """What is said in so many ticks, in which so many rounds end; a state or its shapes."""
        inner, outer = self.rounds.inner, self.rounds.outer
        times, turns = (ticks - rounds * outer.ticks) // inner.ticks, outer.turns
        total = Messages().plus(self.traffic(state)[0], times)
        for turn in range(min(turns, rounds)):
            total = total.plus(self.traffic(state, turn)[1], len(range(turn, rounds, turns)))
        return total

    def wire(self, state: TrainState, ticks: int, number: int = 0) -> list[Collective]:
        """The collectives between devices in the number-th round, of so many ticks; a state or its
        shapes."""
        inner, outer = self.rounds.inner, self.rounds.outer
        times = (ticks - outer.ticks) // inner.ticks
        told = [one._replace(times=one.times * times) for one in inner.says(state)]
        return ledger.wire([*told, *outer.says(state, number)], self.layout, self.mesh.shape)

    def lower(self, state: TrainState, batches: Tree) -> list[tuple[int, Any]]:
        """The programs of a round, each with how often the round runs it: lowered, not compiled,
        as `jax.jit(f).lower` gives them; of a state and batches or their shapes."""
        ending = self.rounds.outer.ticks
        sizes = Counter(self.chunks(self._ticks_of(batches) - ending))
        lowered = [
            (times, self._lowered(size // self.rounds.inner.ticks, state, batches, size))
            for size, times in sizes.items()
        ]
        if self.rounds.outer is not NOTHING:
            own = batches if ending else ()
            lowered.append((1, self._lowered("outer", state, own, ending)))
        return lowered

    def _lowered(self, which: int | str, state: TrainState, batches: Tree, ticks: int):
        shape = lambda x: jax.ShapeDtypeStruct((ticks, *x.shape[1:]), x.dtype)
        shapes = jax.tree.map(shape, batches)
        placed = placing.described(shapes, self._batch_shardings(shapes))
        return self._program(which, state).lower(state, placed, self.world)

    def _measure(self, fn: Any):
        if fn not in self._programs:
            self._programs[fn] = jax.jit(over_mesh(fn, self.mesh, (STACKED, WORLD), P()))
        return self._programs[fn]

    def _program(self, which: int | str, state: TrainState):
        if which not in self._programs:
            outer = which == "outer"
            stage = self.rounds.outer if outer else repeat(self.rounds.inner, int(which))
            self._programs[which] = _compile(
                stage, self.mesh, specs_of(state), 1 if outer else 0, self._states.held
            )
        return self._programs[which]

    def _ticks_of(self, batches: Tree) -> int:
        leading = {jnp.shape(x)[:3] for x in jax.tree.leaves(batches)}
        if len(leading) != 1 or next(iter(leading))[1:] != self.layout.shape:
            raise ConfigurationError(
                f"batches must lead with [ticks, {self.layout.hubs} hubs, "
                f"{self.layout.workers_per_hub} workers], "
                f"got leading shapes {sorted(leading)}"
            )
        ticks = next(iter(leading))[0]
        if ticks % self.rounds.inner.ticks or not ticks:
            raise ConfigurationError(
                f"a round of {ticks} ticks is not a positive multiple of the "
                f"{self.rounds.inner.ticks} of its inner stage"
            )
        if self._examples is not None:
            check_indices(batches, self._examples)
        return ticks

    def _batch_shardings(self, batches: Tree) -> Tree:
        return placing.on(self.mesh, placing.batch_specs(self.mesh, BATCHES, batches))

    def _placed(self, batches: Tree) -> Tree:
        return place(batches, self._batch_shardings(batches))


def check_length(rounds: Rounds, ticks: int) -> None:
    """Whether a round has ticks before its end begins."""
    if ticks <= rounds.outer.ticks:
        raise ConfigurationError(
            f"a round of H = {ticks} is too short for a synchronisation that runs beside its last "
            f"τ = {rounds.outer.ticks} ticks"
        )


def _compile(stage: Stage, mesh: Mesh, specs: TrainState, part: int, held: Any):
    """The stage as one program on the state; `part` says which of the two memories is its own."""

    def run(state, batches, world):
        memories = list(state.memory)
        state, memories[part], info = stage.apply(
            state._replace(memory=()), memories[part], batches, world
        )
        return state._replace(memory=tuple(memories)), info

    mapped = over_mesh(run, mesh, (specs, BATCHES, WORLD), (specs, INFO))

    def program(state, batches, world):
        state, info = mapped(state, batches, world)
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
