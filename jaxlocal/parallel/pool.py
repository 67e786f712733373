"""A pool of examples that stays on the devices, and the batches that point into it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlocal.errors import ConfigurationError
from jaxlocal.types import Tree


def fetch(data: Tree, batch: Tree) -> Tree:
    """The examples of a batch: the batch itself, or, where there is a pool, those that its
    indices point to. A dictionary has them as its "index", and its other entries stay beside the
    examples."""
    if not jax.tree.leaves(data):
        return batch
    if not isinstance(batch, dict):
        return jax.tree.map(lambda pool: pool[batch], data)
    beside = {name: value for name, value in batch.items() if name != "index"}
    return {**jax.tree.map(lambda pool: pool[batch["index"]], data), **beside}


def pool_size(data: Tree) -> int | None:
    """The examples of a pool; None without one."""
    sizes = {len(x) if np.ndim(x) else 0 for x in jax.tree.leaves(data)}
    if len(sizes) > 1:
        raise ConfigurationError(
            f"the arrays of a pool must hold the same number of examples, got {sorted(sizes)}"
        )
    return sizes.pop() if sizes else None


def check_indices(batches: Tree, examples: int) -> None:
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
