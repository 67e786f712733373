"""Mixers: the linear averages by which workers and hubs become alike."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlocal.errors import ConfigurationError
from jaxlocal.topology import check_mixing
from jaxlocal.types import Leaf, Messages, Mixer, Tree, World
from jaxlocal.workers import AXES, Layout, weighted_sum


def mean() -> Mixer:
    """Every worker gets u = Σ a_i x_i.

    A worker says its model to its hub, a hub its average to all other hubs.
    """

    def average(tree: Tree, world: World) -> Tree:
        return jax.tree.map(lambda x: lax.psum(weighted_sum(world.weight, x, "all"), AXES), tree)

    def messages(bits: int, layout: Layout) -> Messages:
        return Messages(workers=bits * (layout.workers_per_hub > 1), hubs=bits * (layout.hubs - 1))

    def gather(tree: Tree, world: World) -> tuple[Tree, Leaf]:
        def one(x):
            x = x.reshape((x.shape[0] * x.shape[1],) + x.shape[2:])
            return lax.all_gather(x, AXES, axis=0, tiled=True, to="invarying")[:, None]

        return jax.tree.map(one, tree), one(world.weight)

    return Mixer(average, AXES, messages, gather)


def hub_mean() -> Mixer:
    """Every worker gets its hub's z_d = Σ v_i x_i. A worker says its model to its hub."""

    def average(tree: Tree, world: World) -> Tree:
        return jax.tree.map(
            lambda x: lax.psum(weighted_sum(world.hub_share, x, "workers"), "workers"), tree
        )

    def messages(bits: int, layout: Layout) -> Messages:
        return Messages(workers=bits * (layout.workers_per_hub > 1))

    def gather(tree: Tree, world: World) -> tuple[Tree, Leaf]:
        def one(x):
            x = jnp.moveaxis(x, 1, 0)
            return lax.all_gather(x, "workers", axis=0, tiled=True, to="invarying")

        return jax.tree.map(one, tree), one(world.hub_share)

    return Mixer(average, ("workers",), messages, gather)


def hub_diffusion(matrix: np.ndarray, workers_per_hub: int | None = None) -> Mixer:
    """Every hub mixes with its neighbours, y_d = Σ_j H_jd z_j, and its workers get y_d.

    Takes hub consensus as given (every worker of hub d holds z_d, as after `hub_mean`), so that
    workers say nothing. A hub says its model to each of its neighbours. Between devices a complete
    graph's H = b 1ᵀ is an all-reduce, a ring passes models to neighbours only, and any other H
    gathers one model of every hub.

    Args:
      matrix: H [D, D] with columns that sum to 1 and H b = b; see `topology.mixing_matrix`.
      workers_per_hub: the only N for which the method that mixes so has hub consensus, if any.
    """
    matrix = check_mixing(matrix)
    neighbours = np.count_nonzero(matrix - np.diag(np.diag(matrix)), axis=1)
    complete = bool(np.abs(matrix - matrix[:, :1]).max() < 1e-12)

    def average(tree: Tree, world: World) -> Tree:
        return jax.tree.map(lambda x: _mix(matrix, complete, x[:, :1], _hub_numbers(world)), tree)

    def messages(bits: int, layout: Layout) -> Messages:
        if workers_per_hub not in (None, layout.workers_per_hub):
            raise ConfigurationError(
                f"mixing without hub averages needs hubs of {workers_per_hub} worker, "
                f"the layout has hubs of {layout.workers_per_hub}"
            )
        check_mixing(matrix, layout.hub_weight)
        return Messages(hubs=bits * int(neighbours.max()))

    return Mixer(average, ("hubs",) if complete else (), messages)


def _hub_numbers(world: World) -> jax.Array:
    """Which hubs this device holds, int32 [d]. Read off the workers' numbers, since the device's
    own place is not known where a mesh axis is left automatic."""
    return world.worker[:, 0] // (world.worker.shape[1] * lax.axis_size("workers"))


def _mix(matrix: np.ndarray, complete: bool, z: jax.Array, hubs: jax.Array) -> jax.Array:
    """y_d = Σ_j H_jd z_j for this device's hubs; z [d, 1, ...] → [d or 1, 1, ...]."""
    wide = jnp.promote_types(z.dtype, jnp.float32)
    z, coefficients = z.astype(wide), jnp.asarray(matrix, wide)
    devices = lax.axis_size("hubs")
    if complete:
        return lax.psum(weighted_sum(coefficients[hubs, :1], z, "all"), "hubs")
    if devices > 1 and _is_ring(matrix):
        return _pass_round(coefficients, z, hubs, devices)
    everyone = lax.all_gather(z, "hubs", axis=0, tiled=True) if devices > 1 else z
    return jnp.einsum(
        "jd,j...->d...", coefficients[:, hubs], everyone, precision=lax.Precision.HIGHEST
    )


def _is_ring(matrix: np.ndarray) -> bool:
    """Whether hub j speaks to hubs j ± 1 only, around the circle of D ≥ 3."""
    size = len(matrix)
    offsets = {int(j - i) % size for i, j in np.argwhere(matrix)}
    return size > 2 and offsets <= {0, 1, size - 1}


def _pass_round(coefficients: jax.Array, z: jax.Array, hubs: jax.Array, devices: int) -> jax.Array:
    """Mixing on a ring: each device hears the last hub of the device before it and the first of
    the one after it."""
    before = lax.ppermute(z[-1:], "hubs", [(i, (i + 1) % devices) for i in range(devices)])
    after = lax.ppermute(z[:1], "hubs", [(i, (i - 1) % devices) for i in range(devices)])
    padded = jnp.concatenate([before, z, after])

    def share(offset: int) -> jax.Array:
        column = coefficients[(hubs + offset) % len(coefficients), hubs]
        return column.reshape((-1,) + (1,) * (z.ndim - 1))

    return share(-1) * padded[:-2] + share(0) * z + share(1) * padded[2:]


def from_matrix(matrix: np.ndarray) -> Mixer:
    """Every worker mixes with any others, y_i = Σ_j W_ji x_j. Between devices this gathers all K
    models.

    Args:
      matrix: W [K, K] with columns that sum to 1 and W a = a.
    """
    matrix = check_mixing(matrix)
    neighbours = np.count_nonzero(matrix - np.diag(np.diag(matrix)), axis=1)

    def average(tree: Tree, world: World) -> Tree:
        def one(x):
            wide = jnp.promote_types(x.dtype, jnp.float32)
            everyone = x.astype(wide)
            for axis, name in enumerate(AXES):
                everyone = lax.all_gather(everyone, name, axis=axis, tiled=True)
            everyone = everyone.reshape((len(matrix),) + x.shape[2:])
            columns = jnp.asarray(matrix, wide)[:, world.worker]
            return jnp.einsum("jdn,j...->dn...", columns, everyone, precision=lax.Precision.HIGHEST)

        return jax.tree.map(one, tree)

    def messages(bits: int, layout: Layout) -> Messages:
        if len(matrix) != layout.workers:
            raise ConfigurationError(
                f"a mixing matrix of {len(matrix)} workers does not fit {layout.workers} workers"
            )
        check_mixing(matrix, layout.weight.reshape(-1))
        return Messages(workers=bits * int(neighbours.max()))

    return Mixer(average, (), messages)
