"""The volume of communication, by two counts: the bits of messages and the collectives of a mesh.

`message_bits` counts what papers count: what each worker and each hub sends, whatever the mesh.
`collectives` lists what the devices of one mesh send to carry the same messages; the audit of a
compiled program is held against it. Both read the list of `Message`s that `Stage.communication`
gives.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp

from jaxlocal.parallel.layout import Layout
from jaxlocal.parallel.leaves import wide
from jaxlocal.types import Collective, Message, MessageBits, Tree


def model_bits(stacked: Tree) -> int:
    """Size of one worker's model in bits, as the worker sends it uncompressed.

    Args:
      stacked: the parameters of all workers, or another tree of theirs, leaves [D, N, ...]; arrays
        or their shapes.

    Returns:
      Bits, a Python int.

    >>> model_bits({"weight": jnp.zeros((1, 8, 10)), "bias": jnp.zeros((1, 8), jnp.bfloat16)})
    336
    """
    return sum(
        8 * x.dtype.itemsize * (x.size // (x.shape[0] * x.shape[1]))
        for x in jax.tree.leaves(stacked)
    )


def message_bits(messages: Iterable[Message], layout: Layout) -> MessageBits:
    """Bits that one worker and one hub send in a list of messages.

    A hub sends the average of its workers' payloads; where payloads cannot be averaged it sends all
    of them.

    Args:
      messages: as `Stage.communication` lists them.
      layout: the hubs and workers that exchange them.

    Returns:
      The bits of the worker and of the hub that send most.

    Raises:
      ConfigurationError: the mixer of a message does not fit the layout.

    >>> from jaxlocal.communication import mixing
    >>> model = {"weight": jax.ShapeDtypeStruct((10,), jnp.float32)}
    >>> message_bits([Message(mixing.mean(), model)], Layout(hubs=3, workers_per_hub=2))
    MessageBits(workers=320, hubs=640)
    """
    total = MessageBits()
    for message in messages:
        bits = 8 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(message.payload))
        sent = message.mixer.message_bits(bits, layout)
        payloads = layout.workers_per_hub if message.gathered else 1
        total = total.plus(sent._replace(hubs=sent.hubs * payloads), message.times)
    return total


def collectives(
    messages: Iterable[Message], layout: Layout, mesh: Mapping[str, int]
) -> list[Collective]:
    """List the collectives by which the devices of a mesh carry a list of messages.

    The workers of one device average among themselves first, so that an average costs one model
    per device, and nothing on a single device. Averages are sent in float32 or wider. Payloads that
    are gathered are sent in their own types, half precision as uint16, together with the weights of
    the average. Where a worker is sharded over devices, each device sends its shard of a model, and
    all of a compressed payload.

    Args:
      messages: as `Stage.communication` lists them.
      layout: the hubs and workers that exchange them.
      mesh: {axis: number of devices}, as `Mesh.shape`.

    Returns:
      Collectives with the bytes of their results on one device.

    >>> from jaxlocal.communication import mixing
    >>> model = {"weight": jax.ShapeDtypeStruct((10,), jnp.float32)}
    >>> layout, mesh = Layout(workers_per_hub=8), {"hubs": 1, "workers": 4}
    >>> collectives([Message(mixing.mean(), model)], layout, mesh)
    [Collective(kind='all-reduce', axes=('workers',), dtype='float32', nbytes=40, times=1)]
    """
    return [c for message in messages for c in _collectives_of(message, layout, mesh)]


def _collectives_of(
    message: Message, layout: Layout, mesh: Mapping[str, int]
) -> Iterator[Collective]:
    sizes = _values_by_dtype(message)
    for kind, axes, copies in message.mixer.collectives(layout, mesh, message.gathered):
        spanned = tuple(axis for axis in axes if mesh[axis] > 1)
        for dtype, size in sizes.items():
            if spanned and size:
                nbytes = copies * size * jnp.dtype(dtype).itemsize
                yield Collective(kind, spanned, dtype, nbytes, message.times)


def _values_by_dtype(message: Message) -> dict[str, int]:
    """The number of values that one device sends of a payload, by the type they are sent in."""
    sizes: dict[str, int] = {}
    for x in jax.tree.leaves(message.payload):
        dtype = _sent_dtype(x.dtype, message.gathered)
        sizes[dtype] = sizes.get(dtype, 0) + _shard_size(x)
    if message.gathered and sizes:
        weight = str(jnp.result_type(float))
        sizes[weight] = sizes.get(weight, 0) + 1
    return sizes


def _sent_dtype(dtype: jnp.dtype, gathered: bool) -> str:
    if not gathered:
        return str(wide(dtype))
    half = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2
    return "uint16" if half else str(dtype)


def _shard_size(x: jax.ShapeDtypeStruct) -> int:
    """The number of a leaf's values that one device holds."""
    return math.prod(x.sharding.shard_shape(x.shape)) if x.sharding else x.size


def by_kind(collectives: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...], str], int]:
    """Sum the bytes of collectives by kind, mesh axes and type.

    >>> by_kind([Collective("all-reduce", ("workers",), "float32", 40, times=3)])
    {('all-reduce', ('workers',), 'float32'): 120}
    """
    total: dict[tuple[str, tuple[str, ...], str], int] = {}
    for one in collectives:
        key = (one.kind, one.axes, one.dtype)
        total[key] = total.get(key, 0) + one.nbytes * one.times
    return total
