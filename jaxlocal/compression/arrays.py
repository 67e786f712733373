"""Helpers on arrays and trees for compressors: sizes in bits, dtypes, flattening, packing."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlocal.compression.batches import cut, join
from jaxlocal.parallel.leaves import wide
from jaxlocal.types import Leaf, Tree


def tree_bits(tree: Tree) -> int:
    """Count the bits of all arrays of a tree, which may be given as their shapes."""
    return sum(8 * x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def is_floating(x: Leaf) -> bool:
    """Whether an array holds floating-point values."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def add(onto: Leaf, x: Leaf, scale: Any) -> Leaf:
    """onto + scale · x, in the dtype of onto."""
    dtype = wide(onto.dtype, x.dtype)
    return (onto.astype(dtype) + jnp.asarray(scale, dtype) * x.astype(dtype)).astype(onto.dtype)


def rows(x: Leaf, length: int) -> Leaf:
    """Cut a vector into rows, [n] → [⌈n / length⌉, length], and pad the last row with zeros.

    >>> rows(jnp.arange(1, 6), 3)
    Array([[1, 2, 3],
           [4, 5, 0]], dtype=int32)
    """
    count = -(-x.size // length)
    return jnp.pad(x, (0, count * length - x.size)).reshape(count, length)


def common_dtype(leaves: Sequence[Leaf]) -> Any:
    """The dtype to which arrays promote."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, (x.dtype for x in leaves))


def flat(leaves: Sequence[Leaf]) -> Leaf:
    """Concatenate arrays into one vector, in the dtype to which they promote."""
    dtype = common_dtype(leaves)
    return join([jnp.ravel(x).astype(dtype) for x in leaves])


def split(vector: Leaf, like: Sequence[Leaf]) -> list[Leaf]:
    """Undo `flat`: cut a vector into arrays with the shapes and dtypes of `like`."""
    parts = cut(vector, [x.size for x in like])
    return [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, like, strict=True)]


def block(x: Leaf, at: Leaf, length: int) -> Leaf:
    """Take consecutive values of a vector from a place on.

    >>> block(jnp.arange(5), jnp.int32(2), 3)
    Array([2, 3, 4], dtype=int32)
    """
    return _take(length)(x, at)


def with_block(x: Leaf, values: Leaf, at: Leaf) -> Leaf:
    """Replace consecutive values of a vector from a place on.

    >>> with_block(jnp.arange(5), jnp.array([8, 9]), jnp.int32(2))
    Array([0, 1, 8, 9, 4], dtype=int32)
    """
    return _put(x, values, at)


def random_words(
    key: Leaf,
    counts: Sequence[int],
    finish: Callable[[Leaf], Leaf] = lambda words: words,
) -> list[Leaf]:
    """Draw one vector of random words, uint32, for each count.

    One call draws them all, and `finish` computes on all of them: a call for each count would
    compile as many random generators. If no word is needed, the key is not used.
    """
    if not sum(counts):
        return [jnp.zeros(0, jnp.uint32) for _ in counts]
    return cut(finish(jax.random.bits(key, (sum(counts),), jnp.uint32)), counts)


def pack(values: Leaf, bits: int) -> Leaf:
    """Pack integers below 2^bits, uint8 [n] → uint8 [⌈n · bits / 8⌉], most significant bit first.

    >>> pack(jnp.array([1, 2, 3, 0], jnp.uint8), 2)
    Array([108], dtype=uint8)
    """
    places = jnp.arange(bits - 1, -1, -1, dtype=jnp.uint8)
    return jnp.packbits((values[:, None] >> places[None]) & 1)


def unpack(packed: Leaf, bits: int, count: int) -> Leaf:
    """Undo `pack`: the first `count` integers, uint8 [count].

    >>> unpack(jnp.array([108], jnp.uint8), 2, 4)
    Array([1, 2, 3, 0], dtype=uint8)
    """
    digits = jnp.unpackbits(packed, count=count * bits).reshape(count, bits)
    places = jnp.arange(bits - 1, -1, -1, dtype=jnp.uint8)
    return (digits << places[None]).sum(axis=1, dtype=jnp.uint8)


def _batched_as_slices(fn: Callable[..., Leaf]) -> Callable[..., Leaf]:
    """Make fn(*arrays, at), of the last dimension of arrays, stay a slice when it is batched.

    JAX makes gathers and scatters of slices at a common place, which take much longer to compile.
    """
    batched = jax.custom_batching.custom_vmap(fn)

    @batched.def_vmap
    def rule(size, are_batched, *arguments):
        *arrays, at = arguments
        if are_batched[-1]:
            axes = tuple(0 if batch else None for batch in are_batched)
            return jax.vmap(fn, axes)(*arguments), True
        pairs = zip(arrays, are_batched[:-1], strict=True)
        arrays = [x if batch else jnp.broadcast_to(x[None], (size, *x.shape)) for x, batch in pairs]
        return batched(*arrays, at), True

    return batched


@functools.cache
def _take(length: int) -> Callable[[Leaf, Leaf], Leaf]:
    take = lambda x, at: lax.dynamic_slice_in_dim(x, at, length, x.ndim - 1)
    return _batched_as_slices(take)


_put = _batched_as_slices(
    lambda x, block, at: lax.dynamic_update_slice_in_dim(x, block, at, x.ndim - 1)
)
