"""Compressors of trees from codecs of vectors.

A codec is a *selection*, which of a vector's values are sent, and a *coder*, how these values are
encoded. A tensor is sent uncompressed if the codec would not make it smaller or if it is not
floating point.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlocal.compression.arrays import (
    add,
    common_dtype,
    flat,
    is_floating,
    random_words,
    split,
    tree_bits,
)
from jaxlocal.compression.batches import batches_by_shape, over_batch, stack, unstack
from jaxlocal.parallel.leaves import wide
from jaxlocal.types import Compressor, Leaf, Tree


class Selection(NamedTuple):
    """Which k of a vector's n values are kept.

    Words are random bits, uint32, that all workers can draw: a mask that follows from them needs no
    index in the payload.
    """

    kept: Callable[[int], int]  # n -> k
    words: Callable[[int], int]  # n -> the number of words it draws
    encode: Callable[[Leaf, Leaf], tuple[Leaf, Tree]]  # (x [n], words) -> values [k], index
    # (x [n], index, words, change) -> x with the kept values v [k] replaced by change(v)
    update: Callable[[Leaf, Tree, Leaf, Callable[[Leaf], Leaf]], Leaf]
    delta: Callable[[int], float]  # n -> δ
    # (sizes n, words of all vectors) -> what `encode` and `update` are given of them instead
    draw: Callable[[Sequence[int], Leaf], Leaf] = lambda sizes, words: words


class Coder(NamedTuple):
    """How the k kept values v are encoded; V(v) is what the decoder makes of them."""

    name: str  # its spec string
    words: Callable[[int], int]  # k -> the number of words it draws
    encode: Callable[[Leaf, Leaf], Tree]  # (v [k], words) -> payload
    decode: Callable[[Tree, int], Leaf]  # (payload, k) -> V(v) [k]
    delta: Callable[[int], float]  # k -> δ: E‖V(v) − v‖² ≤ (1 − δ)‖v‖²
    ratio: float  # bits of float32 values over bits of codes, without scales
    unbiased: bool


EVERYTHING = Selection(
    kept=lambda n: n,
    words=lambda n: 0,
    encode=lambda x, words: (x, ()),
    update=lambda x, index, words, change: change(x),
    delta=lambda n: 1.0,
)
UNCODED = Coder(
    name="",
    words=lambda k: 0,
    encode=lambda values, words: values,
    decode=lambda payload, k: payload,
    delta=lambda k: 1.0,
    ratio=1.0,
    unbiased=True,
)


class Codec(NamedTuple):
    """What is done to each tensor or, with granularity "model", to all values as one vector."""

    selection: Selection
    coder: Coder
    granularity: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VectorsPayload:
    """The payload of vectors of one size, leaves [vectors, ...]."""

    values: Tree
    index: Tree
    # The numbers of the leaves of the tree that each vector holds.
    members: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})


def compressor(
    name: str,
    codec: Codec,
    *,
    ratio: float,
    shared_mask: bool,
    unbiased: bool,
    check: Callable[[Tree], None] = lambda like: None,
) -> Compressor:
    """Make a compressor of trees from a codec of vectors.

    Args:
      name, ratio, shared_mask, unbiased: as in `types.Compressor`.
      codec: the selection and the coder, and to which vectors they apply.
      check: raises ConfigurationError on a tree that the compressor does not fit.

    Returns:
      A compressor without memory.
    """

    def init(like):
        check(like)
        return ()

    return Compressor(
        name=name,
        init=init,
        encode=lambda tree, memory, key: _encode(codec, tree, key),
        decode=functools.partial(_decode, codec),
        delta=functools.partial(_delta, codec),
        ratio=ratio,
        averageable=shared_mask and codec.coder is UNCODED,
        shared_mask=shared_mask,
        unbiased=unbiased,
        granularity=codec.granularity,
    )


def identity() -> Compressor:
    """Send everything uncompressed: C(x) = x, δ = 1.

    Returns:
      The compressor `identity`.

    >>> from jaxlocal.compression import payload_bits
    >>> payload_bits(identity(), {"w": jnp.zeros((3, 4))})
    384
    """
    codec = Codec(EVERYTHING, UNCODED, "value")  # it makes no tensor smaller
    return compressor("identity", codec, ratio=1.0, shared_mask=True, unbiased=True)


def zero() -> Compressor:
    """Send nothing: C(x) = 0, δ = 0, no bits.

    Returns:
      The compressor `zero`.

    >>> from jaxlocal.compression import payload_bits
    >>> payload_bits(zero(), {"w": jnp.zeros((3, 4))})
    0
    """
    return Compressor(
        name="zero",
        init=lambda like: (),
        encode=lambda tree, memory, key: (),
        decode=lambda payload, key, onto, scale: onto,
        delta=lambda like: 0.0,
        ratio=math.inf,
        averageable=True,
        shared_mask=True,
        unbiased=False,
        granularity="value",
    )


def groups(leaves: Sequence[Leaf], granularity: str) -> list[list[int]]:
    """Group the indices of the leaves that are compressed as one vector."""
    if granularity != "model":
        return [[i] for i in range(len(leaves))]
    floating = [i for i, x in enumerate(leaves) if is_floating(x)]
    rest = [[i] for i, x in enumerate(leaves) if not is_floating(x)]
    return ([floating] if floating else []) + rest


def _encode(codec: Codec, tree: Tree, key: Leaf) -> Tree:
    """The payload of a tree, a list with an item for each leaf.

    An item is the leaf itself if it is sent uncompressed, the VectorsPayload of the vectors that
    are compressed together at the first leaf of the first of them, and None at their other leaves.
    """
    leaves = jax.tree.leaves(tree)
    parts = [
        group
        for group in groups(leaves, codec.granularity)
        if _compresses(codec, [leaves[i] for i in group])
    ]
    vectors = [flat([leaves[i] for i in part]) for part in parts]
    batches = batches_by_shape(vectors)
    sizes = [(len(batch), vectors[batch[0]].size) for batch in batches]
    masks = _masks(codec.selection, key, sizes)
    # Masks are drawn from the message's own key, because the decoder has no other.
    draws = lambda n: codec.coder.words(codec.selection.kept(n))
    noisy = any(draws(n) for _, n in sizes)
    noises = _words(jax.random.fold_in(key, 1) if noisy else key, sizes, draws)
    payload = [None if any(i in part for part in parts) else x for i, x in enumerate(leaves)]
    for batch, mask, noise in zip(batches, masks, noises, strict=True):
        xs = stack([vectors[i] for i in batch])
        values, index = over_batch(functools.partial(_encode_vector, codec))(xs, mask, noise)
        members = tuple(tuple(parts[i]) for i in batch)
        payload[members[0][0]] = VectorsPayload(values, index, members)
    return payload


def _masks(selection: Selection, key: Leaf, sizes: Sequence[tuple[int, int]]) -> list[Leaf]:
    """What the selection draws for batches of vectors, (their number, values of each)."""
    finish = functools.partial(selection.draw, [n for count, n in sizes for _ in range(count)])
    return _words(key, sizes, selection.words, finish)


def _words(
    key: Leaf, sizes: Sequence[tuple[int, int]], words: Callable[[int], int], *finish: Callable
) -> list[Leaf]:
    """Random words [vectors, words(n)] for each batch."""
    shapes = [(count, words(n)) for count, n in sizes]
    drawn = random_words(key, list(map(math.prod, shapes)), *finish)
    return [x.reshape(shape) for x, shape in zip(drawn, shapes, strict=True)]


def _decode(codec: Codec, payload: Tree, key: Leaf, onto: Tree, scale: Any) -> Tree:
    # The payload shows which leaves were compressed: `onto` may have other dtypes than the sender's
    # tree, for which `_compresses` could decide otherwise.
    uncompressed = lambda item: item is not None and not isinstance(item, VectorsPayload)
    leaves, structure = jax.tree.flatten(onto)
    pairs = zip(leaves, payload, strict=True)
    leaves = [add(x, item, scale) if uncompressed(item) else x for x, item in pairs]
    batches = [item for item in payload if isinstance(item, VectorsPayload)]
    size = lambda part: sum(leaves[i].size for i in part)
    masks = _masks(
        codec.selection, key, [(len(code.members), size(code.members[0])) for code in batches]
    )
    for code, mask in zip(batches, masks, strict=True):
        parts = [[leaves[i] for i in part] for part in code.members]
        added = _add_vectors(codec, code, mask, parts, scale)
        for i, x in zip(itertools.chain(*code.members), itertools.chain(*added), strict=True):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def _delta(codec: Codec, like: Tree) -> float:
    leaves = jax.tree.leaves(like)
    parts = [[leaves[i] for i in group] for group in groups(leaves, codec.granularity)]
    sizes = [sum(x.size for x in part) for part in parts if _compresses(codec, part)]
    selection, coder = codec.selection, codec.coder
    return min((selection.delta(n) * coder.delta(selection.kept(n)) for n in sizes), default=1.0)


# Compiled by itself, it is traced once for all vectors of one size.
@functools.partial(jax.jit, static_argnums=0)
def _encode_vector(codec: Codec, x: Leaf, mask: Leaf, noise: Leaf) -> tuple[Tree, Tree]:
    values, index = codec.selection.encode(x, mask)
    return codec.coder.encode(values, noise), index


def _add_vectors(
    codec: Codec, code: VectorsPayload, mask: Leaf, parts: list[list[Leaf]], scale: Any
) -> list[list[Leaf]]:
    """Add scale · C to the leaves of each vector of a batch."""

    def added(x, values, index, mask):
        return _add_vector(codec, x, values, index, mask, scale)

    if len(parts) == 1:
        xs = stack([flat(parts[0])])
        (x,) = unstack(over_batch(added)(xs, code.values, code.index, mask))
        return [split(x, parts[0])]
    dtype = wide(*(x.dtype for x in itertools.chain(*parts)))
    nothing = jnp.zeros((len(parts), sum(x.size for x in parts[0])), dtype)
    moves = over_batch(added)(nothing, code.values, code.index, mask)
    like = [[jax.ShapeDtypeStruct(x.shape, dtype) for x in part] for part in parts]
    shares = [split(move, shapes) for move, shapes in zip(unstack(moves), like, strict=True)]
    return [
        [add(x, y, 1) for x, y in zip(part, share, strict=True)]
        for part, share in zip(parts, shares, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _add_vector(codec: Codec, x: Leaf, values: Tree, index: Tree, mask: Leaf, scale: Any) -> Leaf:
    def change(kept):
        return add(kept, codec.coder.decode(values, kept.size), scale)

    return codec.selection.update(x, index, mask, change)


def _compresses(codec: Codec, part: Sequence[Leaf]) -> bool:
    """Whether the codec makes these leaves, taken as one vector, smaller."""
    n = sum(x.size for x in part)
    if not n or not all(map(is_floating, part)):
        return False
    return _bits(codec, n, common_dtype(part)) < tree_bits(part)


@functools.lru_cache(maxsize=1024)
def _bits(codec: Codec, n: int, dtype: Any) -> int:
    """The bits of the payload of n values."""
    shapes = [
        jax.ShapeDtypeStruct((n,), dtype),
        jax.ShapeDtypeStruct((codec.selection.words(n),), jnp.uint32),
        jax.ShapeDtypeStruct((codec.coder.words(codec.selection.kept(n)),), jnp.uint32),
    ]
    return tree_bits(jax.eval_shape(functools.partial(_encode_vector, codec), *shapes))
