"""A pool of examples that stays on the devices, and batches of indices into it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.leaves import check_fits
from jaxlocal.types import Tree


def fetch(data: Tree, batch: Tree) -> Tree:
    """Look up the examples of a batch in the pool.

    Args:
      data: the pool, a tree of arrays [examples, ...]; () without a pool.
      batch: without a pool, the examples themselves. With a pool, indices of examples, int [batch],
        or a dictionary that has them as "index".

    Returns:
      The examples, leaves [batch, ...]; with the other entries of a dictionary.

    >>> pool = {"inputs": jnp.array([0.5, 1.5, 2.5])}
    >>> fetch(pool, jnp.array([2, 0]))
    {'inputs': Array([2.5, 0.5], dtype=float32)}
    """
    if not jax.tree.leaves(data):
        return batch
    if not isinstance(batch, dict):
        return jax.tree.map(lambda pool: pool[batch], data)
    others = {name: value for name, value in batch.items() if name != "index"}
    return {**jax.tree.map(lambda pool: pool[batch["index"]], data), **others}


def pool_size(data: Tree) -> int | None:
    """Number of examples in a pool; None without a pool.

    Raises:
      ConfigurationError: the arrays of the pool differ in their first dimension, or hold integers
        that JAX would wrap.

    >>> pool_size({"inputs": np.zeros((10, 3)), "targets": np.zeros(10)})
    10
    """
    sizes = {len(x) if np.ndim(x) else 0 for x in jax.tree.leaves(data)}
    if len(sizes) > 1:
        raise ConfigurationError(
            f"the arrays of a pool must hold the same number of examples, got {sorted(sizes)}"
        )
    check_fits("the pool", data)
    return sizes.pop() if sizes else None


def check_indices(batches: Tree, examples: int) -> None:
    """Check that batches are indices into a pool.

    Args:
      batches: integer arrays, or a dictionary that has one as "index".
      examples: the number of examples of the pool.

    Indices that lie on devices are read by the host, which waits until they are computed. Inside
    `jax.jit` their values are not known, and JAX takes the nearest example for a wrong one.

    Raises:
      ConfigurationError: there are no integer indices, or an index is outside of the pool.

    >>> check_indices({"index": np.array([3, 1])}, examples=10)
    """
    index: Any = batches.get("index") if isinstance(batches, dict) else batches
    if not (hasattr(index, "dtype") and jnp.issubdtype(index.dtype, jnp.integer)):
        raise ConfigurationError(
            'with a pool of examples batches must be integer indices, or have them as "index", '
            f"got {jax.tree.map(lambda x: getattr(x, 'dtype', type(x).__name__), batches)}"
        )
    ends = [end for part in _on_host(index) for end in (int(part.min()), int(part.max()))]
    if ends and not (min(ends) >= 0 and max(ends) < examples):
        raise ConfigurationError(
            f"indices from {min(ends)} to {max(ends)} do not fit a pool of {examples} examples"
        )


def _on_host(index: Any) -> list[np.ndarray]:
    """The values of indices that this process knows, one copy of each, without empty parts."""
    parts = [index] if isinstance(index, np.ndarray) else []
    if isinstance(index, jax.Array) and not isinstance(index, jax.core.Tracer):
        shards = {str(shard.index): shard.data for shard in index.addressable_shards}
        parts = [np.asarray(data) for data in shards.values()]
    return [part for part in parts if part.size]
