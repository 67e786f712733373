"""Vectors as one, and small arrays of one shape as one batch, in programs that compile fast."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlocal.types import Leaf

SMALL = 2**16  # values: copying so many costs little


def join(vectors: Sequence[Leaf]) -> Leaf:
    """Concatenate vectors of one dtype.

    >>> join([jnp.arange(2), jnp.arange(3)])
    Array([0, 1, 0, 1, 2], dtype=int32)
    """
    if len(vectors) == 1:
        return vectors[0]
    return _join(tuple(x.size for x in vectors))(*vectors)


def cut(vector: Leaf, sizes: Sequence[int]) -> list[Leaf]:
    """Undo `join`: cut a vector into vectors of these sizes.

    >>> cut(jnp.arange(5), [2, 3])
    [Array([0, 1], dtype=int32), Array([2, 3, 4], dtype=int32)]
    """
    return [vector] if len(sizes) == 1 else list(_cut(tuple(sizes))(vector))


def stack(arrays: Sequence[Leaf]) -> Leaf:
    """Stack arrays of one shape and dtype, [batch, ...]."""
    shape = arrays[0].shape
    return join([jnp.ravel(x) for x in arrays]).reshape(len(arrays), *shape)


def unstack(batch: Leaf) -> list[Leaf]:
    """Undo `stack`."""
    count, *shape = batch.shape
    return [x.reshape(shape) for x in cut(jnp.ravel(batch), [math.prod(shape)] * count)]


def batches_by_shape(arrays: Sequence[Leaf]) -> list[list[int]]:
    """Group arrays whose shapes and dtypes are the same.

    What is done to a batch compiles once, where it would for each of its arrays. Stacking copies
    them, so that only small ones share a batch.

    Returns:
      The numbers of the arrays of each batch.

    >>> batches_by_shape([jnp.zeros(2), jnp.zeros(3), jnp.ones(2)])
    [[0, 2], [1]]
    """
    batches: dict[Any, list[int]] = {}
    for i, x in enumerate(arrays):
        kind = (x.shape, np.dtype(x.dtype)) if x.size <= SMALL else i
        batches.setdefault(kind, []).append(i)
    return list(batches.values())


def over_batch(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Map a function over trees of arrays [batch, ...].

    One row alone is not batched, which would make gathers of slices.

    >>> over_batch(jnp.sum)(jnp.ones((1, 3))), over_batch(jnp.sum)(jnp.ones((2, 3)))
    (Array([3.], dtype=float32), Array([3., 3.], dtype=float32))
    """

    def mapped(*trees):
        if jax.tree.leaves(trees)[0].shape[0] > 1:
            return jax.vmap(fn)(*trees)
        alone = jax.tree.map(lambda x: x.reshape(x.shape[1:]), trees)
        return jax.tree.map(lambda x: x.reshape(1, *x.shape), fn(*alone))

    return mapped


@functools.lru_cache(maxsize=1024)
def _join(sizes: tuple[int, ...]) -> Callable[..., Leaf]:
    """Make the function of vectors [..., n] that concatenates them along their last dimension."""

    def join(*vectors):
        if not _hides(sizes):
            return jnp.concatenate(vectors, axis=-1)
        first = vectors[np.argmax(sizes)]
        whole = jnp.zeros((*first.shape[:-1], sum(sizes)), first.dtype)
        for x, at in zip(vectors, _places(sizes, first), strict=True):
            whole = lax.dynamic_update_slice_in_dim(whole, x, at, x.ndim - 1)
        return whole

    return _batched_together(join)


@functools.lru_cache(maxsize=1024)
def _cut(sizes: tuple[int, ...]) -> Callable[[Leaf], tuple[Leaf, ...]]:
    """Make the function that cuts a vector [..., n] along its last dimension."""

    def cut(vector):
        if not _hides(sizes):
            return tuple(jnp.split(vector, np.cumsum(sizes)[:-1], axis=-1))
        axis, pairs = vector.ndim - 1, zip(_places(sizes, vector), sizes, strict=True)
        return tuple(lax.dynamic_slice_in_dim(vector, at, size, axis) for at, size in pairs)

    return _batched_together(cut)


def _batched_together(fn: Callable) -> Callable:
    """Make fn(*arrays), of their last dimension, the same function when it is batched."""
    batched = jax.custom_batching.custom_vmap(jax.jit(fn))

    @batched.def_vmap
    def rule(size, are_batched, *arrays):
        pairs = zip(arrays, are_batched, strict=True)
        whole = lambda x, batch: x if batch else jnp.broadcast_to(x[None], (size, *x.shape))
        results = batched(*(whole(*pair) for pair in pairs))
        return results, jax.tree.map(lambda _: True, results)

    return batched


def _hides(sizes: Sequence[int]) -> bool:
    return 0 < sum(sizes) < 2**32 and jax.default_backend() == "cpu"


def _places(sizes: Sequence[int], x: Leaf) -> tuple[Leaf, ...]:
    """Where each of some consecutive vectors begins, uint32, as values unknown to the compiler.

    XLA compiles a program's equal kernels once, for a CPU one after another. Slices at places that
    it knows are all different, and so is what it fuses with them.

    Args:
      sizes: of the vectors.
      x: an array with any value, from which the places seem to follow.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    one = jnp.ravel(x)[:1]
    bits = lax.bitcast_convert_type(one, jnp.dtype(f"uint{8 * one.dtype.itemsize}"))
    always = (lax.population_count(bits) <= 64).all()
    places = lambda: tuple(map(jnp.uint32, starts))
    return lax.cond(always, places, lambda: tuple(jnp.uint32(0) for _ in starts))
