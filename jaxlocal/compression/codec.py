"""From what is done to one vector to a compressor of a tree.

A codec is a *selection*, which of a tensor's values are said at all, and a *coder*, how they are
said. A tensor that would not take fewer bits so goes as it is, and so does one that is not floating
point.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlocal.compression.arrays import add, flat, is_floating, random_words, split, tree_bits
from jaxlocal.types import Compressor, Leaf, Tree


class Selection(NamedTuple):
    """Which k of a vector's n values are kept.

    Words are random bits, uint32: a mask that follows from them alone needs no index on the wire.
    """

    kept: Callable[[int], int]  # n -> k
    words: Callable[[int], int]  # n -> how many words it draws
    encode: Callable[[Leaf, Leaf], tuple[Leaf, Tree]]  # (x [n], words) -> values [k], index
    # (x [n], index, words, change) -> x with the kept values v [k] replaced by change(v)
    update: Callable[[Leaf, Tree, Leaf, Callable[[Leaf], Leaf]], Leaf]
    delta: Callable[[int], float]  # n -> δ


class Coder(NamedTuple):
    """How k values are said; V(v) is what is heard."""

    name: str
    words: Callable[[int], int]  # k -> how many words it draws
    encode: Callable[[Leaf, Leaf], Tree]  # (v [k], words) -> payload
    decode: Callable[[Tree, int], Leaf]  # (payload, k) -> V(v) [k]
    delta: Callable[[int], float]  # k -> δ: E‖V(v) − v‖² ≤ (1 − δ)‖v‖²
    ratio: float  # of float32 values
    unbiased: bool


EVERYTHING = Selection(
    kept=lambda n: n,
    words=lambda n: 0,
    encode=lambda x, words: (x, ()),
    update=lambda x, index, words, change: change(x),
    delta=lambda n: 1.0,
)
AS_THEY_ARE = Coder(
    name="",
    words=lambda k: 0,
    encode=lambda values, words: values,
    decode=lambda payload, k: payload,
    delta=lambda k: 1.0,
    ratio=1.0,
    unbiased=True,
)


class Codec(NamedTuple):
    """What is done to each tensor, or with granularity "model" to all values as one vector."""

    selection: Selection
    coder: Coder
    granularity: str


class Message(NamedTuple):
    """The payload of a vector."""

    values: Tree
    index: Tree


def compressor(
    name: str,
    codec: Codec,
    *,
    ratio: float,
    shared_mask: bool,
    unbiased: bool,
    check: Callable[[Tree], None] = lambda like: None,
) -> Compressor:
    """A codec as a compressor of trees.

    Args:
      name, ratio, shared_mask, unbiased: as in `types.Compressor`.
      check: raises ConfigurationError on a tree that the compressor does not fit.
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
        averageable=shared_mask and codec.coder is AS_THEY_ARE,
        shared_mask=shared_mask,
        unbiased=unbiased,
        granularity=codec.granularity,
    )


def identity() -> Compressor:
    """Everything, as it is: C(x) = x, δ = 1.

    >>> payload_bits(identity(), {"w": jnp.zeros((3, 4))})
    384
    """
    codec = Codec(EVERYTHING, AS_THEY_ARE, "value")  # never fewer bits, so that all goes as it is
    return compressor("identity", codec, ratio=1.0, shared_mask=True, unbiased=True)


def zero() -> Compressor:
    """Nothing: C(x) = 0, δ = 0, not a bit.

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


def payload_bits(compressor: Compressor, like: Tree) -> int:
    """The bits that one worker says of a tree, in both messages where there are two.

    Args:
      like: arrays, or their shapes.

    Raises:
      ConfigurationError: the compressor does not fit the tree.
    """
    return tree_bits(payload_shapes(compressor, like))


def payload_shapes(compressor: Compressor, like: Tree) -> list[Tree]:
    """The shapes of a worker's payload, or of its two."""

    def said(tree):
        key, second = jax.random.key(0), compressor.second
        first = compressor.encode(tree, compressor.init(tree), key)
        return [first, second.encode(tree, second.settle(first), key)] if second else [first]

    return jax.eval_shape(said, like)


def groups(leaves: Sequence[Leaf], granularity: str) -> list[list[int]]:
    """The numbers of the leaves that are compressed together."""
    if granularity != "model":
        return [[i] for i in range(len(leaves))]
    floating = [i for i, x in enumerate(leaves) if is_floating(x)]
    rest = [[i] for i, x in enumerate(leaves) if not is_floating(x)]
    return ([floating] if floating else []) + rest


def _encode(codec: Codec, tree: Tree, key: Leaf) -> Tree:
    """For every leaf the leaf itself, or what is said of it: for leaves that are compressed
    together, at the first of them, and None for the others."""
    payload = jax.tree.leaves(tree)
    places = groups(payload, codec.granularity)
    places = [place for place in places if _compresses(codec, [payload[i] for i in place])]
    parts = [flat([payload[i] for i in place]) for place in places]
    masks = random_words(key, [codec.selection.words(x.size) for x in parts])
    counts = [codec.coder.words(codec.selection.kept(x.size)) for x in parts]
    # The mask has the message's own key, which is all that a decoder knows.
    noises = random_words(jax.random.fold_in(key, 1) if sum(counts) else key, counts)
    for place, x, mask, noise in zip(places, parts, masks, noises, strict=True):
        payload = [None if i in place else said for i, said in enumerate(payload)]
        payload[place[0]] = _say(codec, x, mask, noise)
    return payload


def _decode(codec: Codec, payload: Tree, key: Leaf, onto: Tree, scale: Any) -> Tree:
    # What was compressed is read off the payload: onto may have other types than what was said.
    whole = lambda said: said is not None and not isinstance(said, Message)
    leaves, structure = jax.tree.flatten(onto)
    pairs = zip(leaves, payload, strict=True)
    leaves = [add(x, said, scale) if whole(said) else x for x, said in pairs]
    others = [i for i, said in enumerate(payload) if said is None]
    places = [[i, *others] for i, said in enumerate(payload) if isinstance(said, Message)]
    sizes = [sum(leaves[i].size for i in place) for place in places]
    masks = random_words(key, [codec.selection.words(n) for n in sizes])
    for place, mask in zip(places, masks, strict=True):
        added = _add(codec, payload[place[0]], mask, [leaves[i] for i in place], scale)
        for i, x in zip(place, added, strict=True):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def _delta(codec: Codec, like: Tree) -> float:
    leaves = jax.tree.leaves(like)
    parts = [[leaves[i] for i in place] for place in groups(leaves, codec.granularity)]
    sizes = [sum(x.size for x in part) for part in parts if _compresses(codec, part)]
    selection, coder = codec.selection, codec.coder
    return min((selection.delta(n) * coder.delta(selection.kept(n)) for n in sizes), default=1.0)


def _say(codec: Codec, x: Leaf, mask: Leaf, noise: Leaf) -> Message:
    values, index = codec.selection.encode(x, mask)
    return Message(codec.coder.encode(values, noise), index)


def _add(codec: Codec, said: Message, mask: Leaf, onto: list[Leaf], scale: Any) -> list[Leaf]:
    def change(values):
        return add(values, codec.coder.decode(said.values, values.size), scale)

    return split(codec.selection.update(flat(onto), said.index, mask, change), onto)


def _compresses(codec: Codec, part: Sequence[Leaf]) -> bool:
    """Whether the part takes fewer bits compressed."""
    n = sum(x.size for x in part)
    if not n or not all(map(is_floating, part)):
        return False
    return _bits(codec, n, jnp.result_type(*part)) < tree_bits(part)


@functools.lru_cache(maxsize=1024)
def _bits(codec: Codec, n: int, dtype: Any) -> int:
    """The bits of n values compressed."""
    shapes = [
        jax.ShapeDtypeStruct((n,), dtype),
        jax.ShapeDtypeStruct((codec.selection.words(n),), jnp.uint32),
        jax.ShapeDtypeStruct((codec.coder.words(codec.selection.kept(n)),), jnp.uint32),
    ]
    return tree_bits(jax.eval_shape(functools.partial(_say, codec), *shapes))
