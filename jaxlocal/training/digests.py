"""Digests of a training state, by which a damaged checkpoint is told from a good one.

A stacked leaf is hashed row by row, one worker at a time, and its digest is the hash of those of
its rows. So it is the same however the workers are divided over devices and processes, and each
process hashes the rows that it holds.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from jaxlocal.parallel.leaves import is_key
from jaxlocal.training.names import described, named_leaves, on_host
from jaxlocal.training.state import specs_of
from jaxlocal.types import TrainState

_BYTES = hashlib.sha256().digest_size
_THREAD_BYTES = 1 << 16  # rows from this size on are hashed in threads; less does not pay for one


def digests(state: TrainState) -> dict[str, str]:
    """The SHA-256 digest of every leaf, over its bytes, dtype and shape.

    All processes make this call, and get the digests of all leaves.

    >>> state = TrainState(np.ones((1, 2, 3)), (), {}, (), (), jax.random.key(0), np.int32(0))
    >>> {name: digest[:6] for name, digest in digests(state).items()}
    {'params': '5cc5ef', 'key': 'eeb4e6', 'step': '046e15'}

    Raises:
      ValueError: processes hold different values of a replicated leaf.
    """
    specs, leaves = specs_of(state), list(named_leaves(state).values())
    of_leaves = lambda spec, part: jax.tree.map(lambda _: len(spec), part)
    leads = jax.tree.leaves(jax.tree.map(of_leaves, specs, state))
    counts = [math.prod(x.shape[:lead]) for x, lead in zip(leaves, leads, strict=True)]
    starts = [0, *itertools.accumulate(counts)]
    table = np.zeros((starts[-1], 1 + _BYTES), np.uint8)  # whether a row is held, and its digest
    with ThreadPoolExecutor() as pool:
        blocks = itertools.chain(*map(_blocks, leaves, leads, starts))
        for numbers, hashed in pool.map(_hash, blocks):
            table[numbers, 0], table[numbers, 1:] = 1, hashed
    rows = _exchanged(table)
    return {
        name: hashlib.sha256(what.encode() + rows[start:end].tobytes()).hexdigest()
        for (name, what), (start, end) in zip(
            described(state).items(), itertools.pairwise(starts), strict=True
        )
    }


def digest(values: Any) -> str:
    """The SHA-256 digest of values that JSON can hold, whatever the order of their names.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _blocks(x: Any, lead: int, start: int) -> Iterator[tuple[NDArray[Any], NDArray[np.uint8]]]:
    """The rows of a leaf that this process holds: their numbers, from `start` on, and bytes."""
    for numbers, values in _held(x, lead):
        count = len(numbers)
        flat = np.ascontiguousarray(values).reshape(count, values.size // count)
        rows = flat.view(np.uint8)
        size = count if rows.shape[1] < _THREAD_BYTES else 1
        for first in range(0, count, size):
            yield start + numbers[first : first + size], rows[first : first + size]


def _held(x: Any, lead: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Numbers and values of the rows on this process, or of all rows if each is divided."""
    x = jax.random.key_data(x) if is_key(x) else x
    grid, row = x.shape[:lead], x.shape[lead:]
    numbers = np.arange(math.prod(grid)).reshape(grid)
    shards = x.addressable_shards if isinstance(x, jax.Array) else []
    if not any(shard.data.shape[lead:] == row for shard in shards):
        yield numbers.ravel(), on_host(x)
        return
    blocks = [numbers[shard.index[:lead]].ravel() for shard in shards]
    once = {block[0]: (block, shard) for block, shard in zip(blocks, shards, strict=True)}
    for block, shard in once.values():  # one of several replicas
        yield block, np.asarray(shard.data)


def _hash(block: tuple[NDArray[Any], NDArray[np.uint8]]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    numbers, rows = block
    joined = b"".join(hashlib.sha256(row).digest() for row in rows)
    return numbers, np.frombuffer(joined, np.uint8).reshape(-1, _BYTES)


def _exchanged(table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The digests of all rows, from the processes that hold them."""
    if jax.process_count() == 1:
        return table[:, 1:]
    tables = np.asarray(multihost_utils.process_allgather(table))
    held, rows = tables[..., :1], tables[..., 1:]
    common = np.take_along_axis(rows, held.argmax(0)[None], 0)[0]
    if (held * (rows != common)).any():
        raise ValueError("processes hold different values of a replicated leaf")
    return common
