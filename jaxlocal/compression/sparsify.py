"""Sparsifiers: few of the values are said, and those exactly."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.compression.arrays import is_floating, rows
from jaxlocal.compression.quantize import coder
from jaxlocal.compression.codec import AS_THEY_ARE, Codec, Selection, compressor, groups
from jaxlocal.errors import ConfigurationError, unknown
from jaxlocal.types import Compressor, Leaf, Tree

CHUNK = 4096  # values
GRANULARITIES = ("chunk", "tensor", "model")


def grbs(ratio: float, values: str | None = None) -> Compressor:
    """The globally randomised blockwise sparsifier: one block of every tensor, the same on all
    workers.

    Of a tensor of n values, taken flat, k = ⌈n / R⌉ that lie together are kept: one of the
    B = ⌈n / k⌉ blocks that cover it, drawn uniformly by the key. All blocks are full: the last may
    overlap the one before it, and what lies in both is kept twice as often. Every value is kept
    with probability 1 / B at least: δ = 1 / B ≥ 1 / ⌈R⌉. Cost is that of the block.

    Args:
      ratio: R ≥ 1.
      values: how kept values are said: "int8", "qsgd:BITS", "bfloat16" or "sign"; without it, as
        they are. With "qsgd" the noise is the same on all workers, since it comes with the key.

    Raises:
      ConfigurationError: a ratio below 1; at init, one above the size of every tensor.

    >>> grbs(64).name, grbs(64).delta({"w": jnp.zeros((64, 64))})
    ('grbs:64', 0.015625)

    Source: Xie, Zheng, Koyejo, Gupta, Li, Lin, "CSER: Communication-efficient SGD with Error
    Reset", NeurIPS 2020, https://arxiv.org/abs/2007.13221. Differs from the released code: a block
    is a piece of the flat tensor, and no tensor is left out.
    """

    def kept(n):
        return math.ceil(n / ratio)

    def blocks(n):
        return -(-n // kept(n))

    def start(n, words):
        # The modulus favours early blocks by B / 2³² at most.
        return jnp.minimum(words[0] % blocks(n) * kept(n), n - kept(n))

    def encode(x, words):
        return lax.dynamic_slice_in_dim(x, start(x.size, words), kept(x.size)), ()

    def update(x, index, words, change):
        at = start(x.size, words)
        values = change(lax.dynamic_slice_in_dim(x, at, kept(x.size)))
        return lax.dynamic_update_slice_in_dim(x, values, at, 0)

    selection = Selection(kept, lambda n: 1, encode, update, delta=lambda n: 1 / blocks(n))
    return _sparsifier("grbs", ratio, values, selection)


def random_k(ratio: float, values: str | None = None) -> Compressor:
    """One value drawn out of every R in a row, the same on all workers.

    A tensor of n values, taken flat, is cut into k = ⌈n / R⌉ runs whose lengths differ by one at
    most; the key draws a value of each, uniformly. δ = 1 / ⌈n / k⌉ ≥ 1 / ⌈R⌉. Unlike k values out
    of all n, this needs no sort.

    Args:
      ratio: R ≥ 1.
      values: as in `grbs`.

    Raises:
      ConfigurationError: a ratio below 1; at init, one above the size of every tensor.

    >>> random_k(8).name, random_k(8).delta({"w": jnp.zeros((64, 64))})
    ('random_k:8', 0.125)
    """

    def kept(n):
        return math.ceil(n / ratio)

    def position(n, words):
        length, longer = divmod(n, kept(n))  # the first so many runs are longer by one
        run = jnp.arange(kept(n), dtype=jnp.uint32)
        return run * length + jnp.minimum(run, longer) + words % (length + (run < longer))

    def encode(x, words):
        return _at(x, position(x.size, words)), ()

    def update(x, index, words, change):
        return _update(x, position(x.size, words), change)

    selection = Selection(kept, kept, encode, update, delta=lambda n: 1 / -(-n // kept(n)))
    return _sparsifier("random_k", ratio, values, selection)


def top_k(ratio: float, granularity: str = "chunk", values: str | None = None) -> Compressor:
    """The largest values by magnitude, one in R, and where they are.

    A vector is cut into chunks of c values; of each the k = ⌈c / R⌉ largest are kept, with their
    places in the chunk in the smallest unsigned type that fits. δ = k / c, for any x.

    Args:
      ratio: R ≥ 1, of values: indices come on top.
      granularity: "chunk": every tensor in equal chunks of at most 4096 values, so that cost is
        linear. "tensor": every tensor is one chunk. "model": all tensors together are one.
      values: as in `grbs`.

    Raises:
      ConfigurationError: a ratio below 1, or an unknown granularity; at init, a ratio above the
        size of every tensor (of the model with "model").

    >>> w = jnp.array([3.0, 0.1, -4.0, 0.2, 0.3, 0.4])
    >>> code = top_k(3)
    >>> code.decode(code.encode(w, (), None), None, jnp.zeros(6), 1.0)
    Array([ 3.,  0., -4.,  0.,  0.,  0.], dtype=float32)

    Source: of chunks, Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo",
    2025, https://arxiv.org/abs/2508.15706.
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
        return _update(x, (first[:, None] + index).reshape(-1), change)

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
    kind = AS_THEY_ARE if values is None else coder(values)
    words = [name, str(int(ratio) if ratio == int(ratio) else float(ratio))]
    if name == "top_k" and granularity != "chunk":
        words.append(granularity)
    name = ":".join(words) + (f"+{kind.name}" if kind.name else "")
    return compressor(
        name,
        Codec(selection, kind, granularity),
        ratio=float(ratio) * kind.ratio,
        shared_mask=shared_mask,
        unbiased=shared_mask and kind.unbiased,
        check=lambda like: _check(name, ratio, granularity, like),
    )


def _check(name: str, ratio: float, granularity: str, like: Tree) -> None:
    """That something of a tree has as many values as the ratio asks for."""
    floating = [x for x in jax.tree.leaves(like) if is_floating(x)]
    sizes = [sum(floating[i].size for i in group) for group in groups(floating, granularity)]
    size, what = max(sizes, default=0), "model" if granularity == "model" else "largest tensor"
    if 0 < size < ratio:
        raise ConfigurationError(f"{name} keeps one value in {ratio:g}, but the {what} has {size}")


def _at(x: Leaf, position: Leaf) -> Leaf:
    """The values at distinct positions; what would be beyond the end is zero."""
    return x.at[position].get(mode="fill", fill_value=0, unique_indices=True)


def _update(x: Leaf, position: Leaf, change: Callable[[Leaf], Leaf]) -> Leaf:
    values = change(_at(x, position))
    return x.at[position].set(values, mode="drop", unique_indices=True)


def _index_type(length: int) -> Any:
    """The smallest unsigned type that tells so many places apart."""
    return next(t for t in (jnp.uint8, jnp.uint16, jnp.uint32) if length <= jnp.iinfo(t).max + 1)
