"""The two counts of what stages say: messages, whatever the mesh, and collectives on one."""

import math
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp

from jaxlocal.parallel.layout import Layout
from jaxlocal.types import Collective, Message, MessageBits, Tree


def model_bits(stacked: Tree) -> int:
    """Size of one worker's model in bits, as it is sent uncompressed.

    Args:
      stacked: the parameters of all workers, or another tree of theirs, leaves [D, N, ...]; arrays
        or their shapes.

    >>> model_bits({"weight": jnp.zeros((1, 8, 10)), "bias": jnp.zeros((1, 8), jnp.bfloat16)})
    336
    """
    return sum(
        8 * x.dtype.itemsize * (x.size // (x.shape[0] * x.shape[1]))
        for x in jax.tree.leaves(stacked)
    )


def message_bits(said: Iterable[Message], layout: Layout) -> MessageBits:
    """Bits that a worker says, and a hub.

    A hub says the average of its workers' payloads or, where there is none, all of them.
    """
    total = MessageBits()
    for one in said:
        bits = 8 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one.payload))
        spoken = one.mixer.message_bits(bits, layout)
        payloads = layout.workers_per_hub if one.gathered else 1
        total = total.plus(spoken._replace(hubs=spoken.hubs * payloads), one.times)
    return total


def collectives(
    said: Iterable[Message], layout: Layout, mesh: Mapping[str, int]
) -> list[Collective]:
    """The collectives by which it is said on a mesh of {axis: devices}.

    The workers of a device average among themselves first, so that an average costs what a model
    does, and on one device nothing. Averages cross in float32 at least; gathered payloads in their
    own types (half precision as its bits, uint16), together with the weights of the average. Where
    a worker is split over devices, each says its part of a model, and all of a compressed payload.
    """
    return [collective for one in said for collective in _carried(one, layout, mesh)]


def _carried(one: Message, layout: Layout, mesh: Mapping[str, int]) -> Iterator[Collective]:
    values: dict[str, int] = {}
    for x in jax.tree.leaves(one.payload):
        dtype = _crossing(x.dtype, one.gathered)
        values[dtype] = values.get(dtype, 0) + _here(x)
    if one.gathered and values:
        weight = str(jnp.result_type(float))
        values[weight] = values.get(weight, 0) + 1
    for kind, axes, copies in one.mixer.collectives(layout, mesh, one.gathered):
        apart = tuple(axis for axis in axes if mesh[axis] > 1)
        for dtype, size in values.items():
            if apart and size:
                nbytes = copies * size * jnp.dtype(dtype).itemsize
                yield Collective(kind, apart, dtype, nbytes, one.times)


def _crossing(dtype: jnp.dtype, gathered: bool) -> str:
    if not gathered:
        return str(jnp.promote_types(dtype, jnp.float32))
    half = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2
    return "uint16" if half else str(dtype)


def _here(x: jax.ShapeDtypeStruct) -> int:
    """How many of a leaf's values one device has: a part of them where a worker is split."""
    return math.prod(x.sharding.shard_shape(x.shape)) if x.sharding else x.size


def by_kind(collectives: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...], str], int]:
    """The bytes of all collectives of a kind, axes and type.

    >>> by_kind([Collective("all-reduce", ("workers",), "float32", 40, times=3)])
    {('all-reduce', ('workers',), 'float32'): 120}
    """
    total: dict[tuple[str, tuple[str, ...], str], int] = {}
    for one in collectives:
        key = (one.kind, one.axes, one.dtype)
        total[key] = total.get(key, 0) + one.nbytes * one.times
    return total
