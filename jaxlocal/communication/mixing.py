"""Mixers: the linear averages by which workers and hubs become alike."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlocal.communication.topology import Route, check_mixing, routes
from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.collectives import psum, weighted_sum, workers_are_sharded
from jaxlocal.parallel.layout import AXES, Layout
from jaxlocal.types import Context, Leaf, MessageBits, Mixer, Tree


def mean() -> Mixer:
    """Every worker gets u = Σ a_i x_i.

    A worker says its model to its hub, a hub its average to all other hubs.
    """

    def average(tree: Tree, context: Context) -> Tree:
        sums = jax.tree.map(lambda x: weighted_sum(context.weight, x, "all"), tree)
        return _at_once(lambda x: psum(x, AXES), sums, AXES)

    def message_bits(bits: int, layout: Layout) -> MessageBits:
        return MessageBits(
            workers=bits * (layout.workers_per_hub > 1), hubs=bits * (layout.hubs - 1)
        )

    def collectives(layout, mesh, gathered):
        return [("all-gather", AXES, layout.workers) if gathered else ("all-reduce", AXES, 1)]

    def gather(tree: Tree, context: Context) -> tuple[Tree, Leaf]:
        def one(x):
            x = x.reshape((x.shape[0] * x.shape[1],) + x.shape[2:])
            return lax.all_gather(x, AXES, axis=0, tiled=True, to="invarying")[:, None]

        return _as_bits(one, (tree, context.weight), AXES)

    return Mixer(average, AXES, message_bits, collectives, gather)


def hub_mean() -> Mixer:
    """Every worker gets its hub's z_d = Σ v_i x_i. A worker says its model to its hub."""

    def average(tree: Tree, context: Context) -> Tree:
        sums = jax.tree.map(lambda x: weighted_sum(context.hub_share, x, "workers"), tree)
        return _at_once(lambda x: psum(x, "workers"), sums, ["workers"])

    def message_bits(bits: int, layout: Layout) -> MessageBits:
        return MessageBits(workers=bits * (layout.workers_per_hub > 1))

    def collectives(layout, mesh, gathered):
        hubs = layout.hubs // mesh["hubs"]
        if gathered:
            return [("all-gather", ("workers",), hubs * layout.workers_per_hub)]
        return [("all-reduce", ("workers",), hubs)]

    def gather(tree: Tree, context: Context) -> tuple[Tree, Leaf]:
        def one(x):
            x = jnp.moveaxis(x, 1, 0)
            return lax.all_gather(x, "workers", axis=0, tiled=True, to="invarying")

        return _as_bits(one, (tree, context.hub_share), ["workers"])

    return Mixer(average, ("workers",), message_bits, collectives, gather)


def hub_diffusion(matrix: np.ndarray, workers_per_hub: int | None = None) -> Mixer:
    """Every hub mixes with its neighbours, y_d = Σ_j H_jd z_j, and its workers get y_d.

    Takes hub consensus as given (every worker of hub d holds z_d, as after `hub_mean`), so that
    workers say nothing. A hub says its model to each of its neighbours. Between devices a complete
    graph's H = b 1ᵀ is an all-reduce; by any other H, models pass to neighbours only.

    Args:
      matrix: H [D, D] with columns that sum to 1 and H b = b; see `topology.mixing_matrix`.
      workers_per_hub: the only N for which the method that mixes so has hub consensus, if any.
    """
    matrix = check_mixing(matrix)
    neighbours = np.count_nonzero(matrix - np.diag(np.diag(matrix)), axis=1)
    complete = bool(np.abs(matrix - matrix[:, :1]).max() < 1e-12)
    routes_over = functools.cache(functools.partial(routes, matrix))

    def average(tree: Tree, context: Context) -> Tree:
        hubs = _hub_numbers(context)
        models = jax.tree.map(lambda x: x[:, :1].astype(_wide(x)), tree)
        if complete:
            share = jnp.asarray(matrix)[hubs, :1]
            sums = jax.tree.map(lambda z: weighted_sum(share, z, "all"), models)
            return _at_once(lambda z: psum(z, "hubs"), sums, ["hubs"])
        passed = routes_over(lax.axis_size("hubs"))
        return _at_once(lambda z: _pass_on(matrix, passed, z, hubs), models, ["hubs"])

    def message_bits(bits: int, layout: Layout) -> MessageBits:
        if workers_per_hub not in (None, layout.workers_per_hub):
            raise ConfigurationError(
                f"mixing without hub averages needs hubs of {workers_per_hub} worker, "
                f"the layout has hubs of {layout.workers_per_hub}"
            )
        check_mixing(matrix, layout.hub_weight)
        return MessageBits(hubs=bits * int(neighbours.max()))

    def collectives(layout, mesh, gathered):
        if complete:
            return [("all-reduce", ("hubs",), 1)]
        passed = routes_over(mesh["hubs"])
        return [("collective-permute", ("hubs",), route.said.shape[1]) for route in passed]

    return Mixer(average, ("hubs",) if complete else (), message_bits, collectives)


def _hub_numbers(context: Context) -> jax.Array:
    """Which hubs this device holds, int32 [d]. Read off the workers' numbers, since the device's
    own place is not known where a mesh axis is left automatic."""
    return context.worker[:, 0] // (context.worker.shape[1] * lax.axis_size("workers"))


def _pass_on(matrix: np.ndarray, passed: list[Route], z: jax.Array, hubs: jax.Array) -> jax.Array:
    """y_d = Σ_j H_jd z_j for this device's hubs, z [d, 1, ...], with what neighbours pass on."""
    own, place = len(hubs), hubs[0] // len(hubs)
    coefficients = jnp.asarray(matrix, z.dtype)[:, hubs]
    mix = lambda share, z: jnp.einsum("jd,j...->d...", share, z, precision=lax.Precision.HIGHEST)
    mixed = mix(lax.dynamic_slice_in_dim(coefficients, place * own, own), z)
    for route in passed:
        said = z[jnp.asarray(route.said)[place]]
        heard = lax.ppermute(said, "hubs", route.pairs)
        known = jnp.asarray(route.heard)[place]
        share = jnp.where(known[:, None] >= 0, coefficients[known], 0)
        mixed += mix(share, heard)
    return mixed


def from_matrix(matrix: np.ndarray) -> Mixer:
    """Every worker mixes with any others, y_i = Σ_j W_ji x_j. Between devices this gathers all K
    models.

    Args:
      matrix: W [K, K] with columns that sum to 1 and W a = a.
    """
    matrix = check_mixing(matrix)
    neighbours = np.count_nonzero(matrix - np.diag(np.diag(matrix)), axis=1)

    def average(tree: Tree, context: Context) -> Tree:
        def one(x):
            for axis, name in enumerate(AXES):
                x = lax.all_gather(x, name, axis=axis, tiled=True)
            everyone = x.reshape((len(matrix),) + x.shape[2:])
            columns = jnp.asarray(matrix, x.dtype)[:, context.worker]
            return jnp.einsum("jdn,j...->dn...", columns, everyone, precision=lax.Precision.HIGHEST)

        return _at_once(one, jax.tree.map(lambda x: x.astype(_wide(x)), tree), AXES)

    def message_bits(bits: int, layout: Layout) -> MessageBits:
        if len(matrix) != layout.workers:
            raise ConfigurationError(
                f"a mixing matrix of {len(matrix)} workers does not fit {layout.workers} workers"
            )
        check_mixing(matrix, layout.weight.reshape(-1))
        return MessageBits(workers=bits * int(neighbours.max()))

    def collectives(layout, mesh, gathered):
        here = layout.hubs * (layout.workers_per_hub // mesh["workers"])
        return [("all-gather", ("hubs",), here), ("all-gather", ("workers",), layout.workers)]

    return Mixer(average, (), message_bits, collectives)


def _wide(x: jax.Array) -> np.dtype:
    """The type in which values are averaged, and averages cross the wire."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _as_bits(gather: Callable, tree: Tree, axes: Any) -> Tree:
    """All leaves gathered at once, half precision as its bits: XLA's CPU backend would say it in
    float32."""
    half = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    bits = lambda x: lax.bitcast_convert_type(x, jnp.uint16) if half(x) else x
    back = lambda x, like: lax.bitcast_convert_type(x, like.dtype) if half(like) else x
    return jax.tree.map(back, _at_once(gather, jax.tree.map(bits, tree), axes), tree)


def _at_once(fn: Callable, tree: Tree, axes: Any) -> Tree:
    """fn of leaves [a, b, ...] → [c, d, ...], of all leaves of a type at once: one message, where
    each would wait for a link. Leaf by leaf where nothing is sent, or where workers are split over
    devices, which would have to be gathered to be joined."""
    if all(lax.axis_size(axis) == 1 for axis in axes) or workers_are_sharded():
        return jax.tree.map(fn, tree)
    leaves, structure = jax.tree.flatten(tree)
    done: list[Any] = list(leaves)
    for dtype in dict.fromkeys(x.dtype for x in leaves):
        places = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        flat = [leaves[i].reshape(leaves[i].shape[:2] + (-1,)) for i in places]
        whole = fn(jnp.concatenate(flat, axis=2))
        ends = np.cumsum([x.shape[2] for x in flat])
        for i, part in zip(places, jnp.split(whole, ends[:-1], axis=2), strict=True):
            done[i] = part.reshape(part.shape[:2] + leaves[i].shape[2:])
    return jax.tree.unflatten(structure, done)
