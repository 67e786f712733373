"""How good the average model is, and what statistics it would have gathered itself."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel import collectives
from jaxlocal.parallel.collectives import broadcast_to_workers, over_mesh
from jaxlocal.parallel.layout import AXES, MODEL, STACKED
from jaxlocal.parallel.mesh import local_rows, place, place_rows, wait_on_cpu_processes
from jaxlocal.parallel.pool import fetch
from jaxlocal.parallel.sharding import batch_specs, is_sharded, named_shardings
from jaxlocal.parallel.worker_maps import over_workers
from jaxlocal.training.round import BATCHES, CONTEXT, RoundFn
from jaxlocal.types import TrainState, Tree

# Examples are moved to the devices, or looked up there, in pieces of about so many bytes.
CHUNK_BYTES = 64 << 20
_MODEL = (STACKED, CONTEXT)


class Evaluation:
    """Means of per-example metrics of the average model u = Σ a_i x_i; `evaluation(state)` → dict
    of floats.

    Every device takes its part of the examples.

    Args:
      round_fn: whose states are evaluated.
      metrics: `metrics(params, model_state, batch)` → dict of [batch].
      data: a pool of examples, a tree of arrays [examples, ...]; by default the pool of the rounds.
      examples: which of them, int [n]; by default all.
      batch_size: examples that a device takes at once.
      source: instead of a pool, what is too large for the device: a sequence of examples, trees of
        arrays, which are read at every evaluation; a process reads its own devices' part.
    """

    def __init__(
        self,
        round_fn: RoundFn,
        metrics: Callable[[Tree, Tree, Tree], dict[str, jax.Array]],
        data: Tree = None,
        examples: np.ndarray | None = None,
        batch_size: int = 500,
        source: Any = None,
    ):
        if data is not None and source is not None:
            raise ConfigurationError("an evaluation takes data or a source, not both")
        mesh = round_fn.mesh
        self._round_fn, self._source = round_fn, source
        pool = round_fn.context.data if data is None else data
        self._data = place(pool if source is None else (), NamedSharding(mesh, P()))
        leaves = jax.tree.leaves(self._data)
        have = len(leaves[0]) if leaves else len(source or ())
        self._examples = _checked(np.arange(have) if examples is None else examples, have)
        one = [x[0] for x in leaves] if source is None else source[0]
        devices, batches, batch = _chunk_shape(
            len(self._examples), mesh.size, batch_size, _size_of(one)
        )
        parts = mesh.shape.get(MODEL, 1)  # the devices of a worker share its batches
        self._shape = devices // parts, batches, batch * parts
        self._within = P(None, MODEL) if is_sharded(mesh) else P()
        # The lookup is a program of its own, so that a pool and a source give the same bits.
        self._lookup = jax.jit(over_mesh(fetch, mesh, (P(), P(AXES)), P(AXES)))
        specs = (*_MODEL, P(AXES), P(AXES))
        self._program = jax.jit(over_mesh(_sums_of(metrics), mesh, specs, P()))

    def __call__(self, state: TrainState) -> dict[str, float]:
        model, context = (state.params, state.model_state), self._round_fn.context
        context = context._replace(data=())
        parts = []
        for examples, counts in self._chunks():
            part = self._program(model, context, examples, counts)
            parts.append(wait_on_cpu_processes(self._round_fn.mesh, part))
            jax.block_until_ready(parts[-2:-1])  # at most two chunks are on the devices
        totals: dict[str, float] = {}
        for part in jax.device_get(parts):
            for name, value in part.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return {name: value / len(self._examples) for name, value in totals.items()}

    def _chunks(self) -> Iterator[tuple[Tree, jax.Array]]:
        """Examples [places, batches, batch, ...], and which of them count: the last chunk is
        filled up with some that do not."""
        mesh, devices = self._round_fn.mesh, self._shape[:1]
        mine = local_rows(mesh, devices, P(AXES))
        total, size = len(self._examples), math.prod(self._shape)
        for start in range(0, total, size):
            places = np.arange(start, start + size).reshape(self._shape)
            rows = self._examples[places[mine] % total]
            batches = rows if self._source is None else read_examples(self._source, rows)
            held = (batches, places[mine] < total)
            batches, counts = place_rows(held, mesh, devices, P(AXES), within=self._within)
            yield wait_on_cpu_processes(mesh, self._lookup(self._data, batches)), counts


class Reestimation:
    """The batch statistics that the average model would have; `reestimation(state)` → the state
    with those in place of its model state, to be evaluated.

    Every worker runs u = Σ a_i x_i on batches of its own. Statistics that move as
    s ← μ s + (1 − μ) b give b, what the batch says of itself, whatever μ is and wherever they
    stood; the result is the mean of b over the batches, and Σ a_i over workers. Values that do not
    move so stay as the average of the workers has them; statistics in half precision are refused.

    Args:
      round_fn: whose states are re-estimated.
      apply: `apply(params, model_state, batch)` → model_state, as in training.
      batches: leaves [batches, hubs, workers, batch, ...], indices where the rounds have a pool.

    Source: as Gu et al., ICLR 2024, https://arxiv.org/abs/2310.14423, evaluate models with batch
    normalisation.
    """

    def __init__(self, round_fn: RoundFn, apply: Callable[[Tree, Tree, Tree], Tree], batches: Tree):
        self._context = round_fn.context
        self._mesh = mesh = round_fn.mesh
        self._batches = place(batches, named_shardings(mesh, batch_specs(mesh, BATCHES, batches)))
        specs = (*_MODEL, BATCHES)
        self._program = jax.jit(over_mesh(_statistics_of(apply), mesh, specs, STACKED))

    def __call__(self, state: TrainState) -> TrainState:
        model = (state.params, state.model_state)
        estimates = self._program(model, self._context, self._batches)
        return state._replace(model_state=wait_on_cpu_processes(self._mesh, estimates))


def _statistics_of(apply):
    def program(model, context, batches):
        params, model_state = collectives.mean(model, context)
        floats, rest = _split(model_state)
        if any(jnp.finfo(x.dtype).bits < 32 for x in floats):
            raise ConfigurationError("statistics in half precision cannot be estimated anew")

        def one_worker(batches):
            def one_batch(sums, batch):
                examples = fetch(context.data, batch)
                after = lambda floats: _split(apply(params, _join(floats, rest), examples))[0]
                said = _own_statistics(after, floats)
                return collectives.vary(jax.tree.map(jnp.add, sums, said)), None

            zeros = collectives.vary(jax.tree.map(jnp.zeros_like, floats))
            sums, _ = lax.scan(one_batch, zeros, batches)
            return jax.tree.map(lambda x: x / len(jax.tree.leaves(batches)[0]), sums)

        per_worker = jax.tree.map(lambda b: jnp.moveaxis(b, 0, 2), batches)
        estimates = collectives.mean(over_workers(one_worker, "map")(per_worker), context)
        common = jax.tree.map(lambda x: x[None, None], _join(estimates, rest))
        return broadcast_to_workers(common, model[1])

    return program


def _own_statistics(after: Callable[[list], list], before: list) -> list:
    """b of s ← μ s + (1 − μ) b, from what becomes of s and of two values aside; s itself where it
    moves in another way."""
    aside = lambda times: [s + times * jnp.maximum(1, jnp.abs(s)) for s in before]
    here, there, beyond = after(before), after(aside(1)), after(aside(2))
    return jax.tree.map(_own_statistic, before, aside(1), here, there, beyond)


def _own_statistic(before, aside, here, there, beyond):
    kept = (there - here) / (aside - before)  # μ
    size = jnp.abs(here) + jnp.abs(there) + jnp.abs(beyond)
    straight = jnp.abs(beyond - 2 * there + here) <= 1e-5 * size
    moves = straight & (kept > -1e-5) & (kept < 1 - 1e-5)  # 0 is met up to rounding only
    return jnp.where(moves, (here - kept * before) / jnp.where(moves, 1 - kept, 1), before)


def _split(tree: Tree) -> tuple[list, Tree]:
    """The floating-point leaves, and the tree without them."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    floats = [x for x in jax.tree.leaves(tree) if is_float(x)]
    return floats, jax.tree.map(lambda x: _FLOAT if is_float(x) else x, tree)


def _join(floats: list, rest: Tree) -> Tree:
    left = iter(floats)
    return jax.tree.map(lambda x: next(left) if x is _FLOAT else x, rest)


_FLOAT = object()


def _checked(examples: Any, have: int) -> np.ndarray:
    rows = np.asarray(examples)
    if not rows.size:
        raise ConfigurationError("an evaluation needs at least 1 example, got 0")
    if not np.issubdtype(rows.dtype, np.integer) or rows.min() < 0 or rows.max() >= have:
        raise ConfigurationError(
            f"the examples of an evaluation must be numbers from 0 to {have - 1}, got {rows.dtype} "
            f"from {rows.min()} to {rows.max()}"
        )
    return rows.astype(np.int32)


def _chunk_shape(examples: int, devices: int, batch_size: int, nbytes: int) -> tuple[int, int, int]:
    """[devices, batches, batch] of equal chunks that together take all examples."""
    per_device = -(-examples // devices)
    batch = min(batch_size, per_device)
    batches = -(-per_device // batch)
    fit = max(1, CHUNK_BYTES // max(1, nbytes * devices * batch))
    chunks = -(-batches // fit)
    return devices, -(-batches // chunks), batch


def _size_of(example: Tree) -> int:
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(example))


def read_examples(source: Any, rows: np.ndarray) -> Tree:
    """The examples of a source that an array of numbers names, leaves [*rows.shape, ...]."""
    numbers = rows.reshape(-1).tolist()
    at_once = getattr(source, "__getitems__", None)  # several, which files give faster
    examples = at_once(numbers) if at_once else [source[number] for number in numbers]
    stack = lambda *parts: np.stack(parts).reshape(rows.shape + np.shape(parts[0]))
    return jax.tree.map(stack, *examples)


def _sums_of(metrics):
    def program(model, context, batches, counts):
        params, model_state = collectives.mean(model, context)

        def one_batch(carry, batch):
            examples, mask = batch
            values = metrics(params, model_state, examples)
            return carry, {name: _sum(jnp.where(mask, value, 0)) for name, value in values.items()}

        mine = jax.tree.map(lambda x: x[0], (batches, counts))
        _, sums = lax.scan(one_batch, (), mine)
        return {name: collectives.psum(value.sum(), AXES) for name, value in sums.items()}

    return program


def _sum(values: jax.Array) -> jax.Array:
    return values.sum(dtype=jnp.promote_types(values.dtype, jnp.float32))
