"""Sparsifiers: few of the values are sent, exactly or encoded by a quantiser."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlocal.compression.arrays import block, is_floating, rows, with_block
from jaxlocal.compression.codec import UNCODED, Codec, Selection, compressor, groups
from jaxlocal.compression.quantize import coder
from jaxlocal.errors import ConfigurationError, unknown
from jaxlocal.types import Compressor, Leaf, Tree

CHUNK = 4096  # values
GRANULARITIES = ("chunk", "tensor", "model")


def grbs(ratio: float, values: str | None = None) -> Compressor:
    """Keep one random block of every tensor, the same on all workers: CSER's GRBS sparsifier.

    The globally randomised blockwise sparsifier keeps k = ⌈n / R⌉ consecutive values of a tensor of
    n values, taken flat: one of the B = ⌈n / k⌉ blocks that cover it, drawn uniformly by the key.
    All blocks have k values: the last may overlap the one before it, and values in both are kept
    twice as often. Every value is kept with probability at least 1 / B: δ = 1 / B ≥ 1 / ⌈R⌉. The
    cost is that of the block, whatever the size of the tensor.

    Args:
      ratio: R ≥ 1, the values of a tensor for each value that is kept.
      values: the coder of the kept values: "sign", "two_bit", "qsgd:BITS", "int8" or "bfloat16". By
        default they are sent uncompressed, and payloads can be averaged. With "qsgd" the noise is
        the same on all workers, since it comes from the key.

    Returns:
      The compressor `grbs:R` or `grbs:R+VALUES`. Its payload has no indices.

    Raises:
      ConfigurationError: a ratio below 1 or an unknown coder; at init, a ratio above the size of
        every tensor.

    >>> grbs(64).name, grbs(64).delta({"w": jnp.zeros((64, 64))})
    ('grbs:64', 0.015625)

    Source: Xie, Zheng, Koyejo, Gupta, Li, Lin, "CSER: Communication-efficient SGD with Error
    Reset", NeurIPS 2020, https://arxiv.org/abs/2007.13221. Differs from the released code in: a
    block is a piece of the flat tensor, and no tensor is left out.
    """

    def kept(n):
        return math.ceil(n / ratio)

    def encode(x, start):
        return block(x, start[0], kept(x.size)), ()

    def update(x, index, start, change):
        return with_block(x, change(block(x, start[0], kept(x.size))), start[0])

    starts = lambda sizes, words: block_starts(sizes, list(map(kept, sizes)), words)
    delta = lambda n: 1 / -(-n // kept(n))
    selection = Selection(kept, lambda n: 1, encode, update, delta, draw=starts)
    return _sparsifier("grbs", ratio, values, selection)


def random_k(ratio: float, values: str | None = None) -> Compressor:
    """Keep one random value of every R consecutive ones, the same on all workers.

    A tensor of n values, taken flat, is cut into k = ⌈n / R⌉ runs whose lengths differ by at most
    one; the key draws one value of each, uniformly. δ = 1 / ⌈n / k⌉ ≥ 1 / ⌈R⌉. It needs no sort,
    which a draw of k values out of all n would.

    Args:
      ratio: R ≥ 1, the values of a tensor for each value that is kept.
      values: the coder of the kept values, as in `grbs`.

    Returns:
      The compressor `random_k:R` or `random_k:R+VALUES`. Its payload has no indices.

    Raises:
      ConfigurationError: a ratio below 1 or an unknown coder; at init, a ratio above the size of
        every tensor.

    >>> random_k(8).name, random_k(8).delta({"w": jnp.zeros((64, 64))})
    ('random_k:8', 0.125)
    """

    def kept(n):
        return math.ceil(n / ratio)

    def position(n, words):
        length, longer = divmod(n, kept(n))  # the first `longer` runs have one value more
        run = jnp.arange(kept(n), dtype=jnp.uint32)
        own = length + (run < longer).astype(jnp.uint32)
        return run * length + jnp.minimum(run, longer) + words % own

    def encode(x, words):
        return _at(x, position(x.size, words)), ()

    def update(x, index, words, change):
        return _update(x, position(x.size, words), change)

    selection = Selection(kept, kept, encode, update, delta=lambda n: 1 / -(-n // kept(n)))
    return _sparsifier("random_k", ratio, values, selection)


def top_k(ratio: float, granularity: str = "chunk", values: str | None = None) -> Compressor:
    """Keep the largest values by magnitude, one in R, and send them with their indices.

    A vector is cut into chunks of c values. Of each chunk the k = ⌈c / R⌉ largest are kept, with
    their indices in the chunk in the smallest unsigned dtype that fits. δ = k / c, for any x.

    Args:
      ratio: R ≥ 1, the values of a chunk for each value that is kept. Indices are not counted.
      granularity: "chunk" cuts every tensor into equal chunks of at most 4096 values, so that the
        cost is linear; "tensor" makes every tensor one chunk; "model" makes all tensors together
        one chunk.
      values: the coder of the kept values, as in `grbs`. It encodes the values of all chunks of a
        vector together: SparseLoCo's compressor is `top_k(64, values="two_bit")`.

    Returns:
      The compressor `top_k:R`, `top_k:R:GRANULARITY` or either with `+VALUES`.

    Raises:
      ConfigurationError: a ratio below 1, an unknown granularity or an unknown coder; at init, a
        ratio above the size of every tensor (with "model", of the model).

    >>> w = jnp.array([3.0, 0.1, -4.0, 0.2, 0.3, 0.4])
    >>> code = top_k(3)
    >>> code.decode(code.encode(w, (), None), None, jnp.zeros(6), 1.0)
    Array([ 3.,  0., -4.,  0.,  0.,  0.], dtype=float32)

    Source: of chunks, Sarfi, Thérien, Lidin, Belilovsky, "Communication Efficient LLM Pre-training
    with SparseLoCo", 2025, https://arxiv.org/abs/2508.15706. Differs from the released code in: a
    chunk is a piece of the flat tensor, not a square block of a matrix.
    """
    if granularity not in GRANULARITIES:
        raise unknown("granularity of top_k", granularity, GRANULARITIES)

    def length(n):
        return -(-n // -(-n // CHUNK)) if granularity == "chunk" else n

    def per_chunk(n):
        return math.ceil(length(n) / ratio)

    def kept(n):
        return -(-n // length(n)) * per_chunk(n)

    def encode(x, words):
        chunks = rows(x, length(x.size))
        index = lax.top_k(jnp.abs(chunks), per_chunk(x.size))[1]
        values = jnp.take_along_axis(chunks, index, axis=1)
        return values.reshape(-1), index.astype(_index_type(length(x.size)))

    def update(x, index, words, change):
        first = length(x.size) * jnp.arange(index.shape[0], dtype=jnp.uint32)
        return _update(x, (first[:, None] + index.astype(first.dtype)).reshape(-1), change)

    def delta(n):
        return per_chunk(n) / length(n)

    selection = Selection(kept, lambda n: 0, encode, update, delta)
    return _sparsifier("top_k", ratio, values, selection, granularity, shared_mask=False)


def _sparsifier(
    name: str,
    ratio: float,
    values: str | None,
    selection: Selection,
    granularity: str = "tensor",
    shared_mask: bool = True,
) -> Compressor:
    number = isinstance(ratio, numbers.Real) and not isinstance(ratio, bool)
    if not number or not 1 <= ratio < math.inf:
        raise ConfigurationError(
            f"the ratio of {name} must be a finite number of at least 1, got {ratio!r}"
        )
    kind = UNCODED if values is None else coder(values)
    parts = [name, str(int(ratio) if ratio == int(ratio) else float(ratio))]
    if name == "top_k" and granularity != "chunk":
        parts.append(granularity)
    name = ":".join(parts) + (f"+{kind.name}" if kind.name else "")
    return compressor(
        name,
        Codec(selection, kind, granularity),
        ratio=float(ratio) * kind.ratio,
        shared_mask=shared_mask,
        unbiased=shared_mask and kind.unbiased,
        check=lambda like: _check(name, ratio, granularity, like),
    )


def block_starts(sizes: Sequence[int], kept: Sequence[int], words: Leaf) -> Leaf:
    """Where the block that a word draws begins in each of some tensors, uint32 [tensors].

    Args:
      sizes: n of each tensor.
      kept: k of each, the values of its block.
      words: random, uint32 [tensors].

    >>> block_starts([10, 10, 4], [4, 4, 4], jnp.array([1, 2, 7], jnp.uint32))
    Array([4, 6, 0], dtype=uint32)
    """
    length, last = np.array(kept, np.uint32), np.subtract(sizes, kept).astype(np.uint32)
    blocks = np.array([-(-n // k) for n, k in zip(sizes, kept, strict=True)], np.uint32)
    # The modulus makes early blocks more probable, by a share of at most B / 2³².
    return jnp.minimum(words % blocks * length, last)


def _check(name: str, ratio: float, granularity: str, like: Tree) -> None:
    """Refuse a tree all of whose vectors have fewer values than the ratio."""
    floating = [x for x in jax.tree.leaves(like) if is_floating(x)]
    sizes = [sum(floating[i].size for i in group) for group in groups(floating, granularity)]
    size, what = max(sizes, default=0), "model" if granularity == "model" else "largest tensor"
    if 0 < size < ratio:
        raise ConfigurationError(f"{name} keeps one value in {ratio:g}, but the {what} has {size}")


def _at(x: Leaf, position: Leaf) -> Leaf:
    """The values at distinct positions, zero for positions beyond the end."""
    return x.at[position].get(mode="fill", fill_value=0, unique_indices=True)


def _update(x: Leaf, position: Leaf, change: Callable[[Leaf], Leaf]) -> Leaf:
    values = change(_at(x, position))
    return x.at[position].set(values, mode="drop", unique_indices=True)


def _index_type(length: int) -> Any:
    """The smallest unsigned dtype that holds indices below `length`."""
    return next(t for t in (jnp.uint8, jnp.uint16, jnp.uint32) if length <= jnp.iinfo(t).max + 1)
