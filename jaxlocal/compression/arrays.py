"""Helpers on arrays and trees for compressors: sizes in bits, dtypes, flattening, packing."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlocal.types import Leaf, Tree


def tree_bits(tree: Tree) -> int:
    """Count the bits of all arrays of a tree, which may be given as their shapes."""
    return sum(8 * x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def is_floating(x: Leaf) -> bool:
    """Whether an array holds floating-point values."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def wide(*dtypes: Any) -> Any:
    """The dtype to compute in: the promotion of the given dtypes and float32."""
    return functools.reduce(jnp.promote_types, dtypes, jnp.float32)


def add(onto: Leaf, x: Leaf, scale: Any) -> Leaf:
    """onto + scale · x, in the dtype of onto."""
    dtype = wide(onto.dtype, x.dtype)
    return (onto.astype(dtype) + scale * x.astype(dtype)).astype(onto.dtype)


def rows(x: Leaf, length: int) -> Leaf:
    """Cut a vector into rows, [n] → [⌈n / length⌉, length], and pad the last row with zeros.

    >>> rows(jnp.arange(1, 6), 3)
    Array([[1, 2, 3],
           [4, 5, 0]], dtype=int32)
    """
    count = -(-x.size // length)
    return jnp.pad(x, (0, count * length - x.size)).reshape(count, length)


def flat(leaves: Sequence[Leaf]) -> Leaf:
    """Concatenate arrays into one vector, in the dtype to which they promote."""
    dtype = jnp.result_type(*leaves)
    vectors = [jnp.ravel(x).astype(dtype) for x in leaves]
    return vectors[0] if len(vectors) == 1 else jnp.concatenate(vectors)


def split(vector: Leaf, like: Sequence[Leaf]) -> list[Leaf]:
    """Undo `flat`: cut a vector into arrays with the shapes and dtypes of `like`."""
    ends = np.cumsum([x.size for x in like])[:-1]
    parts = jnp.split(vector, ends) if len(like) > 1 else [vector]
    return [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, like, strict=True)]


def random_words(key: Leaf, counts: Sequence[int]) -> list[Leaf]:
    """Draw one vector of random words, uint32, for each count.

    One call draws them all: a call for each count would compile as many random generators. If no
    word is needed, the key is not used.
    """
    if not sum(counts):
        return [jnp.zeros(0, jnp.uint32) for _ in counts]
    words = jax.random.bits(key, (sum(counts),), jnp.uint32)
    return jnp.split(words, np.cumsum(counts)[:-1])


def pack(values: Leaf, bits: int) -> Leaf:
    """Pack integers below 2^bits, uint8 [n] → uint8 [⌈n · bits / 8⌉], most significant bit first.

    >>> pack(jnp.array([1, 2, 3, 0], jnp.uint8), 2)
    Array([108], dtype=uint8)
    """
    places = jnp.arange(bits - 1, -1, -1, dtype=jnp.uint8)
    return jnp.packbits((values[:, None] >> places) & 1)


def unpack(packed: Leaf, bits: int, count: int) -> Leaf:
    """Undo `pack`: the first `count` integers, uint8 [count].

    >>> unpack(jnp.array([108], jnp.uint8), 2, 4)
    Array([1, 2, 3, 0], dtype=uint8)
    """
    digits = jnp.unpackbits(packed, count=count * bits).reshape(count, bits)
    places = jnp.arange(bits - 1, -1, -1, dtype=jnp.uint8)
    return (digits << places).sum(axis=1, dtype=jnp.uint8)
