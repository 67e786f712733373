"""Mixers: weighted averages over workers and over hubs, with their costs.

| mixer           | x_i becomes                              | what is sent                       |
|-----------------|------------------------------------------|------------------------------------|
| `mean`          | Σ_j a_j x_j, the average of all workers  | worker → hub, hub → all other hubs |
| `hub_mean`      | Σ_j v_j x_j, the average of its hub      | worker → hub                       |
| `hub_diffusion` | Σ_j H_jd z_j, a mix of neighbouring hubs | hub → neighbouring hubs            |
| `from_matrix`   | Σ_j W_ji x_j, any mix of workers         | worker → workers that mix it       |

A mixer of another kind is a `jaxlocal.types.Mixer` whose functions are made of those in
`jaxlocal.parallel`: `weighted_sum`, `psum`, `fuse_leaves` and `AXES`.
"""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from jaxlocal.communication.routes import Route, routes
from jaxlocal.communication.topology import check_mixing
from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.collectives import psum, weighted_sum
from jaxlocal.parallel.fusing import fuse_leaves
from jaxlocal.parallel.layout import AXES, Layout
from jaxlocal.parallel.leaves import wide
from jaxlocal.types import Context, Leaf, MessageBits, Mixer, Tree


class ByWeight:
    """The `average` of a mixer that is Σ_j a_j x_j on all workers, with the weights of the context,
    so that the workers of a device may be averaged first.

    It marks the function, since a mixer may be given another one by `_replace`.
    """

    def __init__(self, average: Callable[[Tree, Context], Tree]) -> None:
        self._average = average

    def __call__(self, tree: Tree, context: Context) -> Tree:
        return self._average(tree, context)


def mean() -> Mixer:
    """Average the models of all workers: x_i ← u = Σ_j a_j x_j, with weights a_j of the layout.

    Every worker sends its model to its hub, and every hub sends the average of its workers to all
    other hubs. Between devices it is one all-reduce of a model, or an all-gather of payloads that
    cannot be averaged. The result is common to all workers.

    Returns:
      A mixer, for any layout.

    >>> mean().message_bits(320, Layout(hubs=3, workers_per_hub=2))
    MessageBits(workers=320, hubs=640)
    >>> from jaxlocal.parallel import CONTEXT, SINGLE, STACKED, make_mesh, over_mesh
    >>> layout = Layout(workers_per_hub=2, weights=[1, 3])
    >>> mesh = make_mesh(layout, jax.devices()[:1])
    >>> average = over_mesh(mean().average, mesh, (STACKED, CONTEXT), SINGLE)
    >>> average({"bias": jnp.array([[0.0, 4.0]])}, layout.context())
    {'bias': Array([[3.]], dtype=float32)}
    """

    def average(tree: Tree, context: Context) -> Tree:
        sums = jax.tree.map(lambda x: weighted_sum(context.weight, x, "all"), tree)
        return fuse_leaves(lambda x: psum(x, AXES), sums, AXES)

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

        return _gather_as_bits(one, (tree, context.weight), AXES)

    return Mixer(ByWeight(average), AXES, message_bits, collectives, gather)


def hub_mean() -> Mixer:
    """Average the models of each hub's workers: x_i ← z_d = Σ_j v_j x_j over the workers of hub d.

    The shares are v_j = a_j / b_d, with b_d = Σ a_j over the hub. Every worker sends its model to
    its hub; hubs do not communicate. Between devices it is one all-reduce over the axis "workers".
    The result is common to the workers of a hub.

    Returns:
      A mixer, for any layout.

    >>> hub_mean().message_bits(320, Layout(hubs=3, workers_per_hub=2))
    MessageBits(workers=320, hubs=0)
    """

    def average(tree: Tree, context: Context) -> Tree:
        sums = jax.tree.map(lambda x: weighted_sum(context.hub_share, x, "workers"), tree)
        return fuse_leaves(lambda x: psum(x, "workers"), sums, ["workers"])

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

        return _gather_as_bits(one, (tree, context.hub_share), ["workers"])

    return Mixer(average, ("workers",), message_bits, collectives, gather)


def hub_diffusion(matrix: npt.ArrayLike, workers_per_hub: int | None = None) -> Mixer:
    """Mix the models of neighbouring hubs: x_i ← y_d = Σ_j H_jd z_j for every worker i of hub d.

    The mixer assumes that the workers of a hub agree, that every worker of hub j holds z_j, as they
    do after `hub_mean`; workers therefore do not send. Every hub sends its model to each of its
    neighbours. Between devices, H = b 1ᵀ (a complete graph) is one all-reduce; by any other H
    models are sent to neighbours alone, by collective-permutes.

    Args:
      matrix: H [D, D], whose columns sum to 1 and which keeps the weights of the hubs, H b = b; see
        `topology.mixing_matrix`.
      workers_per_hub: the number of workers per hub for which the method has agreement in hubs; by
        default any.

    Returns:
      A mixer, for layouts of D hubs.

    Raises:
      ConfigurationError: the columns of the matrix do not sum to 1; from `message_bits`, the matrix
        or `workers_per_hub` does not fit the layout.

    >>> ring = np.array([[2, 1, 0, 1], [1, 2, 1, 0], [0, 1, 2, 1], [1, 0, 1, 2]]) / 4
    >>> hub_diffusion(ring).message_bits(320, Layout(hubs=4, workers_per_hub=2))
    MessageBits(workers=0, hubs=640)

    Source: Castiglia, Das, Patterson, "Multi-Level Local SGD: Distributed SGD for Heterogeneous
    Hierarchical Networks", ICLR 2021, https://arxiv.org/abs/2007.13819.
    """
    matrix = check_mixing(matrix)
    neighbours = np.count_nonzero(matrix - np.diag(np.diag(matrix)), axis=1)
    complete = bool(np.abs(matrix - matrix[:, :1]).max() < 1e-12)
    routes_over = functools.cache(functools.partial(routes, matrix))

    def average(tree: Tree, context: Context) -> Tree:
        hubs = _hub_numbers(context)
        models = jax.tree.map(lambda x: x[:, :1].astype(wide(x.dtype)), tree)
        if complete:
            share = jnp.asarray(matrix)[hubs, :1]
            sums = jax.tree.map(lambda z: weighted_sum(share, z, "all"), models)
            return fuse_leaves(lambda z: psum(z, "hubs"), sums, ["hubs"])
        permutes = routes_over(lax.axis_size("hubs"))
        return fuse_leaves(lambda z: _mix_neighbours(matrix, permutes, z, hubs), models, ["hubs"])

    def message_bits(bits: int, layout: Layout) -> MessageBits:
        if workers_per_hub not in (None, layout.workers_per_hub):
            raise ConfigurationError(
                f"mixing without hub averages needs hubs of {workers_per_hub} worker, and the "
                f"layout has hubs of {layout.workers_per_hub}"
            )
        check_mixing(matrix, layout.hub_weight)
        return MessageBits(hubs=bits * int(neighbours.max()))

    def collectives(layout, mesh, gathered):
        if complete:
            return [("all-reduce", ("hubs",), 1)]
        permutes = routes_over(mesh["hubs"])
        return [("collective-permute", ("hubs",), route.sent.shape[1]) for route in permutes]

    return Mixer(average, ("hubs",) if complete else (), message_bits, collectives)


def _hub_numbers(context: Context) -> jax.Array:
    """The numbers of the hubs on this device, int32 [d]. They follow from those of its workers: the
    position of a device is not known where a mesh axis is automatic."""
    return context.worker[:, 0] // (context.worker.shape[1] * lax.axis_size("workers"))


def _mix_neighbours(
    matrix: np.ndarray, permutes: list[Route], z: jax.Array, hubs: jax.Array
) -> jax.Array:
    """y_d = Σ_j H_jd z_j for this device's hubs, z [d, 1, ...], in which neighbours send theirs."""
    count, device = len(hubs), hubs[0] // len(hubs)
    coefficients = jnp.asarray(matrix, z.dtype)[:, hubs]
    mix = lambda share, z: jnp.einsum("jd,j...->d...", share, z, precision=lax.Precision.HIGHEST)
    mixed = mix(lax.dynamic_slice_in_dim(coefficients, device * count, count), z)
    for route in permutes:
        sent = z[jnp.asarray(route.sent)[device]]
        received = lax.ppermute(sent, "hubs", route.pairs)
        senders = jnp.asarray(route.received)[device]
        share = jnp.where(senders[:, None] >= 0, coefficients[senders], 0)
        mixed += mix(share, received)
    return mixed


def from_matrix(matrix: npt.ArrayLike) -> Mixer:
    """Mix the models of workers by any matrix: x_i ← Σ_j W_ji x_j.

    Every worker sends its model to each worker that mixes it. Between devices this gathers all K
    models on every device.

    Args:
      matrix: W [K, K], whose columns sum to 1 and which keeps the weights of the workers, W a = a.

    Returns:
      A mixer, for layouts of K workers.

    Raises:
      ConfigurationError: the columns of the matrix do not sum to 1; from `message_bits`, the matrix
        does not fit the layout.

    >>> pairs = np.kron(np.eye(2), np.full((2, 2), 0.5))  # workers 0 and 1, workers 2 and 3
    >>> from_matrix(pairs).message_bits(320, Layout(workers_per_hub=4))
    MessageBits(workers=320, hubs=0)
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

        return fuse_leaves(one, jax.tree.map(lambda x: x.astype(wide(x.dtype)), tree), AXES)

    def message_bits(bits: int, layout: Layout) -> MessageBits:
        if len(matrix) != layout.workers:
            raise ConfigurationError(
                f"a mixing matrix of {len(matrix)} workers does not fit {layout.workers} workers"
            )
        check_mixing(matrix, layout.weight.reshape(-1))
        return MessageBits(workers=bits * int(neighbours.max()))

    def collectives(layout, mesh, gathered):
        block = layout.hubs * (layout.workers_per_hub // mesh["workers"])
        return [("all-gather", ("hubs",), block), ("all-gather", ("workers",), layout.workers)]

    return Mixer(average, (), message_bits, collectives)


def _gather_as_bits(gather: Callable, tree: Tree, axes: Iterable[str]) -> Tree:
    """Gather all leaves at once, half precision as uint16: XLA's CPU backend would send float32."""
    half = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    bits = lambda x: lax.bitcast_convert_type(x, jnp.uint16) if half(x) else x
    back = lambda x, like: lax.bitcast_convert_type(x, like.dtype) if half(like) else x
    return jax.tree.map(back, fuse_leaves(gather, jax.tree.map(bits, tree), axes), tree)
