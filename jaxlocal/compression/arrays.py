"""Small things that are done to arrays on the way into a message and out of it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlocal.types import Leaf, Tree


def tree_bits(tree: Tree) -> int:
    """The bits of all arrays of a tree."""
    return sum(8 * x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def is_floating(x: Leaf) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def wide(*dtypes: Any) -> Any:
    """The type to compute in: float32 at least."""
    return functools.reduce(jnp.promote_types, dtypes, jnp.float32)


def add(onto: Leaf, x: Leaf, scale: Any) -> Leaf:
    """onto + scale · x, in onto's type."""
    dtype = wide(onto.dtype, x.dtype)
    return (onto.astype(dtype) + scale * x.astype(dtype)).astype(onto.dtype)


def rows(x: Leaf, length: int) -> Leaf:
    """[n] → [⌈n / length⌉, length], the last row filled up with zeros.

    >>> rows(jnp.arange(1, 6), 3)
    Array([[1, 2, 3],
           [4, 5, 0]], dtype=int32)
    """
    count = -(-x.size // length)
    return jnp.pad(x, (0, count * length - x.size)).reshape(count, length)


def flat(leaves: Sequence[Leaf]) -> Leaf:
    """All values as one vector, in the type that holds them all."""
    dtype = jnp.result_type(*leaves)
    vectors = [jnp.ravel(x).astype(dtype) for x in leaves]
    return vectors[0] if len(vectors) == 1 else jnp.concatenate(vectors)


def split(vector: Leaf, like: Sequence[Leaf]) -> list[Leaf]:
    """`flat` backwards."""
    ends = np.cumsum([x.size for x in like])[:-1]
    parts = jnp.split(vector, ends) if len(like) > 1 else [vector]
    return [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, like, strict=True)]


def random_words(key: Leaf, counts: Sequence[int]) -> list[Leaf]:
    """So many random words, uint32, for each, by one call: a key for each would be compiled as
    often. Without any to draw the key is not looked at."""
    if not sum(counts):
        return [jnp.zeros(0, jnp.uint32) for _ in counts]
    words = jax.random.bits(key, (sum(counts),), jnp.uint32)
    return jnp.split(words, np.cumsum(counts)[:-1])
