"""Partial synchronisation: the compressed part of what workers hold is averaged, the rest stays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.compression import parse, payload_shapes
from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.collectives import vary, worker_shapes
from jaxlocal.parallel.layout import AXES
from jaxlocal.parallel.leaves import wide
from jaxlocal.parallel.worker_maps import over_workers, worker_map_for
from jaxlocal.types import Compressor, Context, Message, Mixer, Tree

Add = Callable[[Tree], Tree]  # leaves [d or 1, n or 1, ...]


class Synced(NamedTuple):
    """The result of a partial synchronisation of x_i; the new value is `add(residual)`."""

    residual: Tree  # x_i − C(x_i), leaves [d, n, ...]
    add: Add  # tree -> tree + Σ_j W_ji C(x_j)
    memory: Tree  # of the compressor, leaves [d, n, ...]


def partial_sync(
    mixer: Mixer, compressor: Compressor, tree: Tree, memory: Tree, key: jax.Array, context: Context
) -> Synced:
    """Partially synchronise a tree of every worker (PSync).

        s_i = C(x_i);  r_i = x_i − s_i;  the new value is Σ_j W_ji s_j + r_i

    Only the payload of C(x_i) crosses the wire: it is averaged as it is where the compressor allows
    it, and otherwise gathered and decoded. The common part is given as a function that adds it: it
    touches no more than the payload holds, and its result is the same on all workers to the bit.
    (Computed back as `synced − residual` it would round differently on each.)

    Args:
      mixer: W.
      compressor: C.
      tree: x_i, leaves [d, n, ...].
      memory: of the compressor, leaves [d, n, ...], as `compressor_memory` makes it.
      key: the key of this message, shared by all workers.
      context: of the round.

    Returns:
      The residual r_i, the function that adds the common part, and the new memory.

    Source: Xie et al., "CSER: Communication-efficient SGD with Error Reset", NeurIPS 2020,
    https://arxiv.org/abs/2007.13221.
    """
    if not jax.tree.leaves(tree):
        return Synced(tree, lambda empty: empty, memory)
    if compressor.second is None:
        send = lambda x, kept, worker: compress(compressor, x, kept, key, worker)
        # With a shared mask, slicing all workers at once costs only the entries that are kept.
        run = _grid if compressor.shared_mask else _mapped
        payload, residual = run(send)(tree, memory, context.worker)
        return Synced(residual, aggregate(mixer, compressor, payload, tree, key, context), memory)
    second = compressor.second
    first = _grid(lambda x, kept: compressor.encode(x, kept, key))(tree, memory)
    known = _grid(second.settle)(mixer.average(first, context))
    common = _to_workers(known, context)
    rest = _grid(lambda x, known: second.encode(x, known, key))(tree, common)
    minus = lambda x, known, rest: compressor.decode({**known, **rest}, key, x, -1.0)
    residual = _grid(minus)(tree, common, rest)
    average = mixer.average(rest, context)
    remember = lambda kept, payload: second.remember(kept, payload, key)
    memory = _grid(remember)(memory, {**common, **_to_workers(average, context)})
    return Synced(residual, _adder(compressor, {**known, **average}, key), memory)


def compress(
    compressor: Compressor, x: Tree, memory: Tree, key: jax.Array, worker: jax.Array
) -> tuple[Tree, Tree]:
    """Compress one worker's tree: the payload of C(x), and the residual x − C(x)."""
    own = key if compressor.shared_mask else jax.random.fold_in(key, worker)
    payload = compressor.encode(x, memory, own)
    return payload, compressor.decode(payload, key, x, -1.0)


def aggregate(
    mixer: Mixer,
    compressor: Compressor,
    payload: Tree,
    like: Tree,
    key: jax.Array,
    context: Context,
) -> Add:
    """Average the payloads of all workers; returns a function that adds Σ_j W_ji C(x_j) to a tree.

    Args:
      payload: of every worker, leaves [d, n, ...].
      like: the trees that were compressed, leaves [d, n, ...].
      key: the key of this message.
    """
    if compressor.averageable:
        return _adder(compressor, mixer.average(payload, context), key)
    assert mixer.gather is not None
    payloads, weights = mixer.gather(payload, context)

    def add_one(total, sent):
        payload, weight = sent
        one = lambda onto, payload, weight: compressor.decode(payload, key, onto, weight)
        return jax.vmap(one)(total, payload, weight), None

    zeros = lambda x: jnp.zeros(weights.shape[1:] + x.shape[2:], wide(x.dtype))
    apart = [axis for axis in AXES if axis not in mixer.axes]
    start = vary(jax.tree.map(zeros, like), apart)
    total, _ = lax.scan(add_one, start, (payloads, weights))

    def add(x, common):
        dtype = max(x.dtype, common.dtype, key=lambda dtype: dtype.itemsize)
        return (x.astype(dtype) + common[:, None].astype(dtype)).astype(x.dtype)

    return lambda tree: jax.tree.map(add, tree, total)


def add_single(add: Add, tree: Tree) -> Tree:
    """Add the common part to a tree that exists once, leaves [...]."""
    added = add(jax.tree.map(lambda x: x[None, None], tree))
    return jax.tree.map(lambda x: x[0, 0], added)


def carried(mixer: Mixer, compressor: Compressor | str) -> Compressor:
    """The compressor, parsed where it is a spec string, if the mixer can carry its payload.

    Raises:
      ConfigurationError: it cannot, or this is not a compressor.
    """
    if isinstance(compressor, str):
        compressor = parse(compressor)
    if not isinstance(compressor, Compressor):
        raise ConfigurationError(
            f"a compressor is one of jaxlocal.compression or a spec string such as 'top_k:64', got "
            f"{compressor!r}"
        )
    check_mixer(mixer)
    if not compressor.averageable and mixer.gather is None:
        raise ConfigurationError(
            f"the messages of {compressor.name} cannot be averaged as they are, and this mixer "
            f"gathers none; mixing.mean and mixing.hub_mean do"
        )
    if compressor.second is not None and "workers" not in mixer.axes:
        raise ConfigurationError(
            f"{compressor.name} needs a mixer that makes the workers of a hub common; this one "
            f"makes them common over {mixer.axes}"
        )
    return compressor


def check_mixer(mixer: Any) -> None:
    """Raise ConfigurationError where this is not a mixer."""
    if not isinstance(mixer, Mixer):
        raise ConfigurationError(
            f"a mixer is what jaxlocal.mixing.mean() and the others make, got {mixer!r}"
        )


def check_common(what: str, mixer: Mixer) -> None:
    """Raise ConfigurationError where the mixer does not make all workers common, so that there is
    no anchor."""
    check_mixer(mixer)
    if set(mixer.axes) != set(AXES):
        raise ConfigurationError(
            f"{what} needs a mixer that makes all workers common, over the axes {AXES}; this one "
            f"makes them common over {mixer.axes}"
        )


def partial_sync_messages(mixer: Mixer, compressor: Compressor, stacked: Tree) -> list[Message]:
    """List the messages of one partial synchronisation of a tree.

    Args:
      mixer, compressor: of the synchronisation.
      stacked: the tree of every worker, leaves or shapes [D, N, ...].

    >>> from jaxlocal import compression, mixing
    >>> tree = {"w": jnp.zeros((1, 2, 64))}
    >>> [m.gathered for m in partial_sync_messages(mixing.mean(), compression.top_k(4), tree)]
    [True]
    """
    payloads = payload_shapes(compressor, worker_shapes(stacked))
    return [Message(mixer, payload, not compressor.averageable) for payload in payloads]


def compressor_memory(compressor: Compressor, stacked: Tree) -> Tree:
    """The compressor's memory before the first message, of every worker; leaves [D, N, ...]."""
    memory = compressor.init(worker_shapes(stacked))
    leaves = jax.tree.leaves(stacked)
    grid = leaves[0].shape[:2] if leaves else ()
    return jax.tree.map(lambda x: jnp.broadcast_to(x, grid + jnp.shape(x)), memory)


def _adder(compressor: Compressor, average: Tree, key: jax.Array) -> Add:
    """Make the function that adds a decoded average, leaves [d or 1, n or 1, ...], to a tree."""

    def add(tree):
        leaves = jax.tree.leaves(tree)
        grid = leaves[0].shape[:2] if leaves else (1, 1)
        everywhere = jax.tree.map(lambda x: jnp.broadcast_to(x, grid + x.shape[2:]), average)
        decode = lambda payload, x: compressor.decode(payload, key, x, 1.0)
        return _grid(decode)(everywhere, tree)

    return add


def _grid(fn: Callable) -> Callable:
    return jax.vmap(jax.vmap(fn))


def _mapped(fn: Callable) -> Callable:
    """Run fn of one worker's trees over the workers of this device, in the fastest way."""

    def mapped(*trees):
        one = jax.tree.map(lambda x: x[0, 0], trees)
        return over_workers(fn, worker_map_for(fn, *one))(*trees)

    return mapped


def _to_workers(tree: Tree, context: Context) -> Tree:
    """Leaves [d or 1, n or 1, ...] as [d, n, ...]."""
    grid = context.worker.shape
    return jax.tree.map(lambda x: vary(jnp.broadcast_to(x, grid + x.shape[2:])), tree)
