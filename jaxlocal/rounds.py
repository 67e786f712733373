"""The compiled round: a method, a layout of workers and a mesh made into `state, info =
round_fn(state, batches)`."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlocal import ledger, workers
from jaxlocal.compose import join, repeat
from jaxlocal.errors import ConfigurationError
from jaxlocal.placement import local_rows, place, place_rows
from jaxlocal.syncing import NOTHING
from jaxlocal.types import (
    Collective,
    Info,
    Memory,
    Messages,
    Rounds,
    Stage,
    TrainState,
    Tree,
    World,
)
from jaxlocal.workers import AXES, SINGLE, STACKED, Layout, over_mesh

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
      mesh: of axes ('hubs', 'workers'); by default as many of the devices as the layout divides
        over. It may span processes (`jax.distributed`): each then makes the same calls. Batches are
        the same host arrays in all of them, of which each moves the rows of its `local_workers`;
        or `local_batches`, where it holds no others.
      data: a pool of examples, a tree of arrays [examples, ...], kept whole on every device.
        Batches are then indices into it, which travel instead of the examples.
      max_chunk: the most ticks that are dispatched at once; bounds the memory for batches.

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
    ):
        self.rounds = rounds
        self.layout = layout
        self.mesh = mesh if mesh is not None else workers.make_mesh(layout)
        self.local_workers = local_rows(self.mesh, layout.shape)
        if not self.local_workers.size:
            raise ConfigurationError(
                f"process {jax.process_index()} has no device in the mesh of {self.mesh.size}"
            )
        self._examples = _pool_size(data)
        self.world = self._place(layout.world(data), WORLD)
        self._most = max(1, max_chunk // rounds.inner.ticks)
        self._programs: dict[Any, Any] = {}

    def init(self, params: Tree, key: jax.Array, model_state: Tree = None) -> TrainState:
        """The state before the first tick: every worker starts from the same parameters.

        Args:
          params: one model's parameters; they stay the caller's own.
          key: a typed root key, `jax.random.key(seed)`.
          model_state: what a model keeps besides its parameters; {} if none.
        """
        typed = jnp.issubdtype(getattr(key, "dtype", np.dtype(object)), jax.dtypes.prng_key)
        if not typed or key.shape:
            got = f"{jnp.shape(key)} keys" if typed else type(key).__name__
            raise ConfigurationError(
                f"the root key must be one typed key as of jax.random.key, got {got}"
            )
        self.traffic(self.shapes(params, model_state))  # checks that the mixers fit the layout
        given = (params, {} if model_state is None else model_state, key)
        if self.mesh.is_multi_process:
            given = self._place(given, SINGLE)
        return self._init(*given)

    def shapes(self, params: Tree, model_state: Tree = None) -> TrainState:
        """The shapes, dtypes and shardings of the state that `init` makes, of parameters or their
        shapes."""
        model_state = {} if model_state is None else model_state
        shapes = self._init.eval_shape(params, model_state, jax.random.key(0))
        return jax.tree.map(
            lambda spec, part: jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec)
                ),
                part,
            ),
            _specs(shapes),
            shapes,
        )

    @functools.cached_property
    def _init(self):
        def make(params, model_state, key):
            stack = lambda tree: jax.tree.map(
                lambda x: jnp.broadcast_to(x, self.layout.shape + jnp.shape(x)), tree
            )
            stacked = stack(params)
            opt_state = jax.vmap(jax.vmap(self.rounds.optimizer.init))(stacked)
            anchored = self.rounds.inner.anchored or self.rounds.outer.anchored
            anchor = jax.tree.map(_wide, params) if anchored else ()
            state = TrainState(
                stacked, opt_state, stack(model_state), anchor, (), key, jnp.int32(0)
            )
            memory = (self.rounds.inner.init(state), self.rounds.outer.init(state))
            return jax.tree.map(_strong, state._replace(memory=memory))

        def placed(*arguments):
            out = jax.eval_shape(make, *arguments)
            shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), _specs(out))
            return lax.with_sharding_constraint(make(*arguments), shardings)

        return jax.jit(placed)

    def __call__(self, state: TrainState, batches: Tree) -> tuple[TrainState, Info]:
        """One whole round: H ticks, then what ends the round."""
        state, info = self.local_steps(state, batches)
        state, last = self.end_round(state)
        return state, join([info, last])

    def local_steps(self, state: TrainState, batches: Tree) -> tuple[TrainState, Info]:
        """Some ticks of a round without what ends it; cut anywhere between two inner stages."""
        ticks, infos, start = self._ticks_of(batches), [], 0
        if self._examples is not None:
            _check_indices(batches, self._examples)
        for size in self.chunks(ticks):
            part = batches
            if size < ticks:
                part = jax.tree.map(lambda b, a=start, n=size: b[a : a + n], batches)
            state, info = self._program(size // self.rounds.inner.ticks, state)(
                state, self._place(part, BATCHES), self.world
            )
            infos.append(info)
            start += size
        return state, _concatenate(infos)

    def end_round(self, state: TrainState) -> tuple[TrainState, Info]:
        """What ends a round."""
        if self.rounds.outer is NOTHING:
            return state, Info()
        return self._program("outer", state)(state, (), self.world)

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
        return self._measure(workers.mean)((state.params, state.model_state), self.world)

    def consensus_distance(self, state: TrainState) -> jax.Array:
        """√(Σ a_i ‖x_i − u‖²) of the workers' models now."""
        return self._measure(workers.consensus_distance)(state.params, self.world)

    def traffic(self, state: TrainState, number: int = 0) -> tuple[Messages, Messages]:
        """The messages of one inner stage and of the end of the number-th round, from 0; a state or
        its shapes."""
        inner, outer = self.rounds.inner, self.rounds.outer
        told = inner.says(state), outer.says(state, number)
        return ledger.messages(told[0], self.layout), ledger.messages(told[1], self.layout)

    def messages(self, state: TrainState, ticks: int, rounds: int) -> Messages:
        """What is said in so many ticks, in which so many rounds end; a state or its shapes."""
        total = Messages().plus(self.traffic(state)[0], ticks // self.rounds.inner.ticks)
        turns = self.rounds.outer.turns
        for turn in range(min(turns, rounds)):
            total = total.plus(self.traffic(state, turn)[1], len(range(turn, rounds, turns)))
        return total

    def wire(self, state: TrainState, ticks: int, number: int = 0) -> list[Collective]:
        """The collectives between devices in the number-th round, of so many ticks; a state or its
        shapes."""
        inner, outer = self.rounds.inner, self.rounds.outer
        times = ticks // inner.ticks
        told = [one._replace(times=one.times * times) for one in inner.says(state)]
        return ledger.wire([*told, *outer.says(state, number)], self.layout, self.mesh.shape)

    def compiled(self, state: TrainState, batches: Tree) -> list[Any]:
        """The compiled programs of a round in the order in which they run, for `ledger.audit`; of a
        state and batches or their shapes."""
        shape = lambda x, size: jax.ShapeDtypeStruct(
            (size, *x.shape[1:]), x.dtype, sharding=NamedSharding(self.mesh, BATCHES)
        )
        runs: list[tuple[Any, Tree]] = [
            (size // self.rounds.inner.ticks, jax.tree.map(lambda x, n=size: shape(x, n), batches))
            for size in self.chunks(self._ticks_of(batches))
        ]
        runs += [("outer", ())] if self.rounds.outer is not NOTHING else []
        lowered = {
            which: self._program(which, state).lower(state, part, self.world)
            for which, part in runs
        }
        programs = {which: program.compile() for which, program in lowered.items()}
        return [programs[which] for which, _ in runs]

    def _measure(self, fn: Any):
        if fn not in self._programs:
            self._programs[fn] = jax.jit(over_mesh(fn, self.mesh, (STACKED, WORLD), P()))
        return self._programs[fn]

    def _program(self, which: int | str, state: TrainState):
        if which not in self._programs:
            outer = which == "outer"
            stage = self.rounds.outer if outer else repeat(self.rounds.inner, int(which))
            self._programs[which] = _compile(stage, self.mesh, _specs(state), 1 if outer else 0)
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
        return ticks

    def _place(self, tree: Tree, specs: Any) -> Tree:
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
        return place(tree, shardings)


def _specs(state: TrainState) -> TrainState:
    """Where the parts of a state live, as a prefix of its tree."""
    is_memory = lambda node: isinstance(node, Memory)
    memory = jax.tree.map(lambda _: Memory(STACKED, SINGLE), state.memory, is_leaf=is_memory)
    return TrainState(STACKED, STACKED, STACKED, SINGLE, memory, SINGLE, SINGLE)


def _compile(stage: Stage, mesh: Mesh, specs: TrainState, part: int):
    """The stage as one program on the state; `part` says which of the two memories is its own."""

    def run(state, batches, world):
        memories = list(state.memory)
        state, memories[part], info = stage.apply(
            state._replace(memory=()), memories[part], batches, world
        )
        return state._replace(memory=tuple(memories)), info

    mapped = over_mesh(run, mesh, (specs, BATCHES, WORLD), (specs, INFO))
    return jax.jit(mapped, donate_argnums=0)


def _pool_size(data: Tree) -> int | None:
    """The examples of a pool; None without one."""
    sizes = {len(x) if np.ndim(x) else 0 for x in jax.tree.leaves(data)}
    if len(sizes) > 1:
        raise ConfigurationError(
            f"the arrays of a pool must hold the same number of examples, got {sorted(sizes)}"
        )
    return sizes.pop() if sizes else None


def _check_indices(batches: Tree, examples: int) -> None:
    """Where there is a pool, batches are indices, or a dictionary that has them as its "index"."""
    index: Any = batches.get("index") if isinstance(batches, dict) else batches
    if not (hasattr(index, "dtype") and jnp.issubdtype(index.dtype, jnp.integer)):
        raise ConfigurationError(
            'the rounds have a pool, so batches must be integer indices, or have them as "index", '
            f"got {jax.tree.map(lambda x: getattr(x, 'dtype', type(x).__name__), batches)}"
        )
    if (
        isinstance(index, np.ndarray)
        and index.size
        and not (index.min() >= 0 and index.max() < examples)
    ):
        raise ConfigurationError(
            f"indices from {index.min()} to {index.max()} do not fit a pool of {examples} examples"
        )


def _wide(x: Any) -> jax.Array:
    """What an anchor holds of a parameter: half precision would lose what workers differ by."""
    x = jnp.asarray(x)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if is_float else x


def _strong(x: jax.Array) -> jax.Array:
    """The array without JAX's weak type, which a round would lose, to be compiled again."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x if is_key else lax.convert_element_type(x, x.dtype)


def _concatenate(infos: Sequence[Info]) -> Info:
    """One report of several chunks; joined on the host, where it takes no compilation, if it lies
    in this process."""
    if len(infos) == 1:
        return infos[0]
    here = lambda x: not isinstance(x, jax.core.Tracer) and x.is_fully_addressable
    if not all(here(x) for x in jax.tree.leaves(infos)):
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *infos)
    return jax.tree.map(lambda *parts: np.concatenate([np.asarray(p) for p in parts]), *infos)
