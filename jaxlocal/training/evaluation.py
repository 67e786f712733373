"""Evaluate the average model on examples in memory, on the devices or in a source."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from jaxlocal.errors import ConfigurationError, check_integer
from jaxlocal.parallel import collectives
from jaxlocal.parallel.collectives import over_mesh
from jaxlocal.parallel.layout import AXES, CONTEXT, MODEL
from jaxlocal.parallel.leaves import check_fits, describe, dtype_of, is_key, wide
from jaxlocal.parallel.mesh import jit_on, local_rows, place, place_rows, wait_on_cpu_processes
from jaxlocal.parallel.pool import fetch, pool_size
from jaxlocal.parallel.sharding import is_sharded
from jaxlocal.training.ahead import Ahead, Compiling
from jaxlocal.training.common_state import models_of
from jaxlocal.training.programs import OnModels
from jaxlocal.training.reestimation import Reestimation
from jaxlocal.training.round import RoundFn
from jaxlocal.types import TrainState, Tree

__all__ = ["CHUNK_BYTES", "Evaluation", "Reestimation", "read_examples"]

CHUNK_BYTES = 64 << 20  # approximate size of the examples that are on the devices at once
Metrics = Callable[[Tree, Tree, Tree], dict[str, jax.Array]]


class Evaluation:
    """Evaluate the average model: `evaluation(state)` gives the mean of each metric over examples.

    The average model is u = Σ a_i x_i, over workers i with weights a_i and models x_i. Each device
    evaluates a part of the examples.

    Args:
      round_fn: the round function of the states.
      metrics: `metrics(params, model_state, batch)` gives the metrics of each example, by name
        [batch], such as `jaxlocal.models.evaluation_metrics(...)`.
      data: a pool of examples, a tree of arrays [examples, ...], which is held by every device; by
        default the pool of `round_fn`.
      examples: numbers of the examples to evaluate, int [n]; by default all.
      batch_size: number of examples that a device evaluates at once.
      source: a sequence of examples, each a tree of arrays, to read in place of `data` where the
        examples are too large for a device. Every evaluation reads them; each process reads only
        the examples of its devices.

    Raises:
      ConfigurationError: `data` and `source` are both given, there is no example, or `examples` are
        not numbers of examples; raised by a call for metrics that are not [batch].

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w * batch).mean())
    >>> method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.1))
    >>> round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
    >>> state = round_fn.init(np.float32(2), jax.random.key(0))
    >>> metrics = lambda params, model_state, batch: {"product": params * batch["x"]}
    >>> Evaluation(round_fn, metrics, {"x": np.arange(5, dtype=np.float32)})(state)
    {'product': 4.0}
    """

    def __init__(
        self,
        round_fn: RoundFn,
        metrics: Metrics,
        data: Tree = None,
        examples: NDArray[Any] | None = None,
        batch_size: int = 500,
        source: Any = None,
    ) -> None:
        if data is not None and source is not None:
            raise ConfigurationError("an evaluation takes data or a source, not both")
        check_integer("the batch size of an evaluation", batch_size)
        mesh = round_fn.mesh
        self._round_fn, self._source = round_fn, source
        self._context, self._compiling = round_fn.context._replace(data=()), Compiling()
        pool = round_fn.context.data if data is None else data
        self._data = place(pool if source is None else (), NamedSharding(mesh, P()))
        leaves = jax.tree.leaves(self._data)
        have = (pool_size(pool) or 0) if source is None else len(source)
        self._examples = _checked(np.arange(have) if examples is None else examples, have)
        # Of the shapes: an operation on the arrays would fail in `jax.set_mesh` of another mesh.
        size = sum(x.nbytes // have for x in leaves) if source is None else _size_of(source[0])
        devices, batches, batch = _chunk_shape(len(self._examples), mesh.size, batch_size, size)
        parts = mesh.shape.get(MODEL, 1)  # the devices of a sharded worker share its batches
        self._shape = devices // parts, batches, batch * parts
        self._within = P(None, MODEL) if is_sharded(mesh) else P()
        # The lookup is a separate program, so that a pool and a source give the same bits.
        self._lookup = jit_on(mesh, over_mesh(fetch, mesh, (P(), P(AXES)), P(AXES)))
        specs = (CONTEXT, P(AXES), P(AXES))
        self._program = OnModels(_sums_of(metrics), mesh, specs, P())

    def __call__(self, state: TrainState) -> dict[str, float]:
        """The mean of each metric over the examples, by name."""
        self._round_fn.check_models(state)
        self._compiling.finished(self)
        parts, model = [], models_of(state)
        for examples, counts in self._chunks():
            parts.append(self._program(model, self._context, examples, counts))
            jax.block_until_ready(parts[-2:-1])  # at most two chunks are on the devices
        totals: dict[str, float] = {}
        for part in jax.device_get(parts):
            for name, value in part.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return {name: value / len(self._examples) for name, value in totals.items()}

    def compile_ahead(self, state: TrainState, ahead: Ahead) -> None:
        """Compile the program in a thread, before an evaluation; the state may be its shapes."""
        lowered = self._program.lower(models_of(state), self._context, *next(self._chunks()))
        self._compiling.begin(self, lowered, ahead)

    def _chunks(self) -> Iterator[tuple[Tree, jax.Array]]:
        """Chunks of examples [devices, batches, batch, ...], and a mask of those that count.

        The last chunk repeats examples that do not count.
        """
        mesh, devices = self._round_fn.mesh, self._shape[:1]
        mine = local_rows(mesh, devices, P(AXES))
        total, size = len(self._examples), math.prod(self._shape)
        for start in range(0, total, size):
            numbers = np.arange(start, start + size).reshape(self._shape)[mine]
            rows = self._examples[numbers % total]
            batches = rows if self._source is None else read_examples(self._source, rows)
            check_fits("examples", batches)
            held = (batches, numbers < total)
            batches, counts = place_rows(held, mesh, devices, P(AXES), within=self._within)
            yield wait_on_cpu_processes(mesh, self._lookup(self._data, batches)), counts


def _checked(examples: Any, have: int) -> NDArray[np.int32]:
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
    """The shape [devices, batches, batch] of equal chunks that together hold all examples."""
    per_device = -(-examples // devices)
    batches = -(-per_device // batch_size)
    batch = -(-per_device // batches)  # the last one is as full as the others
    fit = max(1, CHUNK_BYTES // max(1, nbytes * devices * batch))
    chunks = -(-batches // fit)
    return devices, -(-batches // chunks), batch


def _size_of(example: Tree) -> int:
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(example))


def read_examples(source: Any, rows: NDArray[Any]) -> Tree:
    """Read examples from a source and stack them.

    Args:
      source: a sequence of examples, each a tree of arrays; its `__getitems__(numbers)` reads
        several at once, if it has one.
      rows: numbers of the examples, an int array of any shape.

    Returns:
      A tree of arrays [*rows.shape, ...].

    >>> read_examples([{"x": 10}, {"x": 11}, {"x": 12}], np.array([[2, 0], [1, 1]]))
    {'x': array([[12, 10],
           [11, 11]])}
    """
    numbers = rows.reshape(-1).tolist()
    at_once = getattr(source, "__getitems__", None)  # files give several examples faster
    examples = at_once(numbers) if at_once else [source[number] for number in numbers]
    stack = lambda *parts: np.stack(parts).reshape(rows.shape + np.shape(parts[0]))
    return jax.tree.map(stack, *examples)


def _sums_of(metrics: Metrics) -> Callable[..., dict[str, jax.Array]]:
    def program(model: Tree, context: Any, batches: Tree, counts: Any) -> dict[str, jax.Array]:
        params, model_state = collectives.mean(model, context)

        def one_batch(carry: Tree, batch: Tree) -> tuple[Tree, dict[str, jax.Array]]:
            examples, mask = batch
            values = metrics(params, model_state, examples)
            _check_metrics(values, mask)
            return carry, {name: _sum(value, mask) for name, value in values.items()}

        mine = jax.tree.map(lambda x: x[0], (batches, counts))
        _, sums = lax.scan(one_batch, (), mine)
        return {name: collectives.psum(value.sum(), AXES) for name, value in sums.items()}

    return program


def _check_metrics(metrics: Any, mask: jax.Array) -> None:
    """Raise ConfigurationError where a metric is no number of each example: others are no sums."""
    if not isinstance(metrics, Mapping):
        raise ConfigurationError(
            f"the metrics of an evaluation must be a dictionary by name, got {describe(metrics)}"
        )
    for name, value in metrics.items():
        dtype = dtype_of(value)
        real = dtype is not None and not jnp.issubdtype(dtype, jnp.complexfloating)
        if not real or is_key(value) or jnp.shape(value) != mask.shape:
            raise ConfigurationError(
                f"the metrics of an evaluation must be real numbers of each example, of shape "
                f"{list(mask.shape)} here, and {name!r} is {describe(value)}"
            )


def _sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    counted = jnp.where(mask, values, jnp.zeros_like(values))
    return counted.sum(dtype=wide(counted.dtype))
