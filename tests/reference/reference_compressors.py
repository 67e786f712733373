"""Compressors as plain NumPy; the conventions are those of `reference_compressed`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from reference import Array

Compress = Callable[[Array, int], Array]


def each(one: Callable[[Array], Array]) -> Compress:
    """The compressor that applies a function to the vector of each worker, in every message."""
    return lambda vectors, message: np.stack([one(vector) for vector in vectors])


identity = each(lambda vector: vector)
zero = each(np.zeros_like)


def top_k(kept: int) -> Compress:
    """The entries of largest magnitude; of two equal ones the first."""

    def one(vector: Array) -> Array:
        order = sorted(range(len(vector)), key=lambda i: -abs(vector[i]))
        sent = np.zeros_like(vector)
        sent[order[:kept]] = vector[order[:kept]]
        return sent

    return each(one)


sign = each(lambda vector: np.where(vector < 0, -1.0, 1.0) * np.mean(np.abs(vector)))


def shared_block(kept: int, start_of: Callable[[int], int]) -> Compress:
    """`kept` entries from start_of(message) on, cyclically, the same on all workers."""

    def compress(vectors: Array, message: int) -> Array:
        sent = np.zeros_like(vectors)
        for offset in range(kept):
            column = (start_of(message) + offset) % vectors.shape[1]
            sent[:, column] = vectors[:, column]
        return sent

    return compress
