"""Programs over the mesh, and the sums, averages and distances of the workers in them."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlocal.parallel.layout import AXES, MODEL
from jaxlocal.types import Context, Tree

_TYPED: ContextVar[bool] = ContextVar("_TYPED", default=True)


def over_mesh(fn: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """fn run on every device of the mesh, on the device's own block. Where a worker is split over
    several devices, on a worker's own, which they share as the compiler sees fit.

    Values are typed by the mesh axes over which they differ, which proves that what is declared
    common is. A user's loop that carries a constant fails under those types; it runs without them.
    """
    places: dict[str, Any] = {"mesh": mesh, "in_specs": in_specs, "out_specs": out_specs}
    places["axis_names"] = set(AXES)

    def mapped(*arguments):
        try:
            return jax.shard_map(fn, **places)(*arguments)
        except TypeError as error:
            if "manual ax" not in str(error):
                raise
        before = _TYPED.set(False)
        try:
            return jax.shard_map(fn, **places, check_vma=False)(*arguments)
        finally:
            _TYPED.reset(before)

    return mapped


def vary(tree: Tree, axes: Sequence[str] = AXES) -> Tree:
    """The tree, typed as differing over the mesh axes, as `shard_map` asks of what meets
    per-worker values; outside of `shard_map` as it is."""
    manual = jax.sharding.get_abstract_mesh().manual_axes

    def one(x):
        varying = jax.typeof(x).manual_axis_type.varying
        missing = tuple(a for a in axes if a in manual and a not in varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree) if _TYPED.get() else tree


def worker_shapes(stacked: Tree) -> Tree:
    """The shapes of one worker's tree, of leaves (or shapes) [D, N, ...], and how it is split where
    it is."""

    def one(x):
        where = getattr(x, "sharding", None)
        if isinstance(where, NamedSharding) and MODEL in where.mesh.axis_names:
            where = NamedSharding(where.mesh, P(*where.spec[2:]))
            return jax.ShapeDtypeStruct(x.shape[2:], x.dtype, sharding=where)
        return jax.ShapeDtypeStruct(x.shape[2:], x.dtype)

    return jax.tree.map(one, stacked)


def broadcast_to_workers(tree: Tree, like: Tree) -> Tree:
    """An average, leaves [d or 1, n or 1, ...], given back to every worker with the type of
    `like`."""
    return jax.tree.map(lambda x, y: vary(jnp.broadcast_to(x, y.shape).astype(y.dtype)), tree, like)


def weighted_sum(weight: jax.Array, x: jax.Array, over: str) -> jax.Array:
    """Σ weight · x over this device's workers, [d, n, ...] → [1 or d, 1, ...]; `over` is "workers"
    or "all".

    A dot product, which every backend does well (XLA's CPU reduction over a leading axis is several
    times slower). Half-precision values are summed in float32.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    apart = over == "workers"
    # One long dimension is fastest; but it would gather a worker that is split over devices.
    flat = x if workers_are_sharded() else x.reshape(x.shape[:2] + (-1,))
    form = "dn,dn...->d..." if apart else "dn,dn...->..."
    total = jnp.einsum(
        form, weight.astype(wide), flat.astype(wide), precision=lax.Precision.HIGHEST
    )
    return total.reshape((x.shape[0] if apart else 1, 1) + x.shape[2:])


def workers_are_sharded() -> bool:
    """Whether, inside `over_mesh`, a worker is split over several devices, of which the compiler
    takes care."""
    return MODEL in jax.sharding.get_abstract_mesh().auto_axes


def psum(x: jax.Array, axes: str | Sequence[str]) -> jax.Array:
    """The sum of x over mesh axes, common to them."""
    return _reduced(lax.psum, x, axes)


def pmax(x: jax.Array, axes: str | Sequence[str]) -> jax.Array:
    """The largest x over mesh axes, common to them."""
    return _reduced(lax.pmax, x, axes)


def _reduced(reduce: Callable, x: jax.Array, axes: str | Sequence[str]) -> jax.Array:
    # On a mesh of 1 × 1 × model XLA cannot partition an all-reduce over the axes of workers; the
    # gather of what one device has, which nothing is sent for either, it can.
    if workers_are_sharded() and all(lax.axis_size(axis) == 1 for axis in AXES):
        return lax.all_gather(x, axes, to="invarying")[0]
    return reduce(x, axes)


def mean(params: Tree, context: Context) -> Tree:
    """u = Σ a_i x_i, leaves [...], common to all workers.

    Of values that are not floating point, such as counters, the largest.
    """

    def one(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return _mean(x, context).astype(x.dtype)
        largest = x.astype(jnp.int32).max((0, 1)) if x.dtype == bool else x.max((0, 1))
        return pmax(largest, AXES).astype(x.dtype)

    return jax.tree.map(one, params)


def consensus_distance(params: Tree, context: Context) -> jax.Array:
    """√(Σ a_i ‖x_i − u‖²), float [], over all leaves."""

    def square(x):
        u = _mean(x, context)
        return weighted_sum(context.weight, jnp.square(x.astype(u.dtype) - u), "all").sum()

    floats = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.sqrt(psum(sum(map(square, floats)), AXES))


def _mean(x: jax.Array, context: Context) -> jax.Array:
    return psum(weighted_sum(context.weight, x, "all"), AXES)[0, 0]
