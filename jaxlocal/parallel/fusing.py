"""Collectives of whole trees: the leaves of a type in one message."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlocal.parallel.collectives import workers_are_sharded
from jaxlocal.types import Tree


def fuse_leaves(fn: Callable, tree: Tree, axes: Iterable[str]) -> Tree:
    """Apply a collective to all leaves of a type at once, so that they are sent in one message.

    Leaf by leaf every message would wait for a link. Leaves stay apart where nothing is sent, and
    where workers are sharded over devices: joining their leaves would gather them.

    Args:
      fn: a collective of arrays [a, b, size] → [c, d, size], for any size.
      tree: leaves [a, b, ...].
      axes: the mesh axes over which `fn` communicates.

    Returns:
      The results, leaves [c, d, ...].

    >>> fuse_leaves(lambda x: 2 * x, {"bias": jnp.ones((1, 1)), "scale": jnp.ones((1, 1))}, [])
    {'bias': Array([[2.]], dtype=float32), 'scale': Array([[2.]], dtype=float32)}
    """
    if all(lax.axis_size(axis) == 1 for axis in axes) or workers_are_sharded():
        return jax.tree.map(fn, tree)
    leaves, structure = jax.tree.flatten(tree)
    results: list[Any] = list(leaves)
    for dtype in dict.fromkeys(x.dtype for x in leaves):
        places = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        flat = [
            leaves[i].reshape((*leaves[i].shape[:2], math.prod(leaves[i].shape[2:])))
            for i in places
        ]
        joined = fn(jnp.concatenate(flat, axis=2))
        ends = np.cumsum([x.shape[2] for x in flat])
        for i, part in zip(places, jnp.split(joined, ends[:-1], axis=2), strict=True):
            results[i] = part.reshape(part.shape[:2] + leaves[i].shape[2:])
    return jax.tree.unflatten(structure, results)
