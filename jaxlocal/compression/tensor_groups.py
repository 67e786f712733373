"""GRBS over whole tensors: a group of them is drawn, and a block of each of its tensors is sent."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlocal.compression.arrays import (
    add,
    block,
    common_dtype,
    flat,
    is_floating,
    random_words,
    with_block,
)
from jaxlocal.compression.sparsify import block_starts, grbs
from jaxlocal.errors import ConfigurationError, check_integer
from jaxlocal.parallel.leaves import wide
from jaxlocal.types import Compressor, Leaf, Tree


def grbs_tensors(ratio: float, groups: int) -> Compressor:
    """Keep a random block of each tensor of a random group of tensors, the same on all workers.

    The tensors are divided into G groups whose blocks have about the same size together: each, the
    largest first, joins the group that is smallest so far. The key draws one of the groups, and of
    each of its tensors a block, as `grbs` does. Every tensor is kept with probability 1 / G:
    δ = 1 / (G ⌈R⌉) at least, and the nominal ratio is G·R.

    A payload has the size of the largest group, whichever is drawn, and all of it is counted. Where
    one tensor has more than the Gth part of the model, bits shrink by less than the nominal ratio:
    the largest of a ResNet-18 is a fifth of it, and bits shrink by 3.8·R for G = 4 and 4.7·R from
    G = 8 on.

    Args:
      ratio: R ≥ 1, the values of a tensor for each value that is kept; 1 sends whole tensors.
      groups: G ≥ 1.

    Returns:
      The compressor `grbs_tensors:R:G`. Its payload has no indices, and can be averaged.

    Raises:
      ConfigurationError: a ratio below 1 or no group; at init, fewer tensors than groups, or a
        ratio above the size of every tensor.

    >>> code = grbs_tensors(4, 8)
    >>> code.name, code.ratio, code.delta([jnp.zeros(64)] * 8)
    ('grbs_tensors:4:8', 32.0, 0.03125)

    Source: `layer_sparse_ratio` of the code released with Xie et al., "CSER", NeurIPS 2020,
    https://arxiv.org/abs/2007.13221. Differs from it in: there every tensor is drawn by itself with
    probability 1 / G, so that the size of a message varies and may be zero; here tensors are drawn
    together, each with that probability.
    """
    check_integer("the groups of grbs_tensors", groups)
    blocks = grbs(ratio)  # which checks the ratio
    kept = lambda n: math.ceil(n / ratio)

    def init(like):
        blocks.init(like)
        if len(tensors := _floating(like)) < groups:
            raise ConfigurationError(
                f"grbs_tensors divides the tensors into {groups} groups, but there are "
                f"{len(tensors)}"
            )
        return ()

    def encode(tree, memory, key):
        leaves, tensors = jax.tree.leaves(tree), _floating(tree)
        rest = [x for x in leaves if not _is_compressed(x)]
        if not tensors:
            return [jnp.zeros(0), *rest]
        drawn = _draw(key, [x.size for x in tensors], kept, groups)
        dtype, rows = common_dtype(tensors), []
        for group in drawn.groups:
            cut = lambda i: block(flat([tensors[i]]), drawn.starts[i], kept(tensors[i].size))
            row = jnp.concatenate([cut(i).astype(dtype) for i in group])
            rows.append(jnp.pad(row, (0, drawn.size - row.size)))
        return [lax.dynamic_index_in_dim(jnp.stack(rows), drawn.group, keepdims=False), *rest]

    def decode(payload, key, onto, scale):
        leaves, structure = jax.tree.flatten(onto)
        tensors, (values, *rest) = _floating(onto), payload
        if tensors:
            drawn = _draw(key, [x.size for x in tensors], kept, groups)
            tensors = _added(tensors, values, drawn, kept, scale)
        added, uncompressed = iter(tensors), iter(rest)
        one = lambda x: next(added) if _is_compressed(x) else add(x, next(uncompressed), scale)
        return jax.tree.unflatten(structure, [one(x) for x in leaves])

    return Compressor(
        name=f"grbs_tensors:{blocks.name.split(':')[1]}:{groups}",
        init=init,
        encode=encode,
        decode=decode,
        delta=lambda like: blocks.delta(_floating(like)) / groups,
        ratio=blocks.ratio * groups,
        averageable=True,
        shared_mask=True,
        unbiased=True,
        granularity="tensor",
    )


class _Drawn(NamedTuple):
    """What a key draws for tensors of given sizes."""

    groups: list[list[int]]  # the numbers of the tensors of each group
    size: int  # values of the largest group
    group: Leaf  # int32 [], the one that is drawn
    starts: Leaf  # uint32 [tensors], of the blocks


def _is_compressed(x: Leaf) -> bool:
    return is_floating(x) and x.size > 0


def _floating(tree: Tree) -> list[Leaf]:
    """The tensors that are compressed."""
    return [x for x in jax.tree.leaves(tree) if _is_compressed(x)]


def _draw(key: Leaf, sizes: Sequence[int], kept: Callable[[int], int], groups: int) -> _Drawn:
    lengths = list(map(kept, sizes))

    def finish(words):
        starts = block_starts(sizes, lengths, words[1:])
        return jnp.concatenate([words[:1] % np.uint32(groups), starts])

    group, starts = random_words(key, [1, len(sizes)], finish)
    members = _balanced(lengths, groups)
    largest = max(sum(lengths[i] for i in group) for group in members)
    return _Drawn(members, largest, group[0].astype(jnp.int32), starts)


def _balanced(lengths: Sequence[int], groups: int) -> list[list[int]]:
    """Divide numbered lengths into groups of about the same sum, the largest length first."""
    members: list[list[int]] = [[] for _ in range(groups)]
    totals = [0] * groups
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        smallest = min(range(groups), key=lambda g: (totals[g], len(members[g])))
        members[smallest].append(i)
        totals[smallest] += lengths[i]
    return members


def _added(
    tensors: Sequence[Leaf],
    values: Leaf,
    drawn: _Drawn,
    kept: Callable[[int], int],
    scale: Any,
) -> list[Leaf]:
    """The tensors with scale · values added to the blocks of the group that is drawn."""
    results, scale = list(tensors), jnp.asarray(scale, wide(values.dtype))
    for number, group in enumerate(drawn.groups):
        share = jnp.where(drawn.group == number, scale, jnp.zeros_like(scale))
        at = 0
        for i in group:
            length, x = kept(tensors[i].size), flat([tensors[i]])
            own = add(block(x, drawn.starts[i], length), values[at : at + length], share)
            results[i] = with_block(x, own, drawn.starts[i]).reshape(tensors[i].shape)
            at += length
    return results
