"""Programs over the mesh of workers, and sums, averages and distances between the workers."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlocal.parallel.layout import AXES, MODEL
from jaxlocal.parallel.leaves import is_averaged, is_key, wide
from jaxlocal.types import Context, Tree

_TYPED: ContextVar[bool] = ContextVar("_TYPED", default=True)
_ALIKE: ContextVar[bool] = ContextVar("_ALIKE", default=False)


def over_mesh(
    fn: Callable, mesh: Mesh, in_specs: Any, out_specs: Any, typed: bool = True
) -> Callable:
    """Map a function over the devices of a mesh: `jax.shard_map` over the axes of workers.

    Inside, `fn` sees the block of workers of its device, leaves [d, n, ...], and communicates by
    the axes "hubs" and "workers". Where workers are sharded over the axis "model", the devices of
    one worker see the same block, and the compiler divides the work between them.

    Values are typed by the mesh axes over which they vary, which proves that a result declared as
    common is common. A user's loop that carries a constant fails under those types; the function
    is then mapped without them.

    Args:
      fn: a function of trees.
      mesh: as `make_mesh` gives it.
      in_specs: how the arguments lie on the mesh, prefixes of their trees: `STACKED` for leaves
        [D, N, ...], `SINGLE` for leaves that are the same on all devices, `CONTEXT` for a Context.
      out_specs: how the results lie on the mesh.
      typed: whether values have those types; without them, what is declared common is believed.

    Returns:
      A function of the global arrays.

    >>> from jaxlocal.parallel import CONTEXT, SINGLE, STACKED, Layout, make_mesh
    >>> layout = Layout(workers_per_hub=2, weights=[1, 3])
    >>> mesh = make_mesh(layout, jax.devices()[:1])
    >>> over_mesh(mean, mesh, (STACKED, CONTEXT), SINGLE)(jnp.array([[0.0, 4.0]]), layout.context())
    Array(3., dtype=float32)
    """
    options: dict[str, Any] = {"mesh": mesh, "in_specs": in_specs, "out_specs": out_specs}
    options["axis_names"] = set(AXES)

    def mapped(*arguments):
        try:
            if typed:
                return jax.shard_map(fn, **options)(*arguments)
        except TypeError as error:
            if "manual ax" not in str(error):
                raise
        before = _TYPED.set(False)
        try:
            return jax.shard_map(fn, **options, check_vma=False)(*arguments)
        finally:
            _TYPED.reset(before)

    return mapped


def vary(tree: Tree, axes: Sequence[str] = AXES) -> Tree:
    """Type the leaves of a tree as varying over mesh axes, as `shard_map` demands of values that
    are combined with those of workers.

    Args:
      tree: arrays inside `over_mesh`; outside of it they are returned as they are.
      axes: the mesh axes.

    Returns:
      The same values.

    >>> vary(jnp.ones(2))
    Array([1., 1.], dtype=float32)
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes

    def one(x):
        varying = jax.typeof(x).manual_axis_type.varying
        missing = tuple(a for a in axes if a in manual and a not in varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree) if _TYPED.get() and not _ALIKE.get() else tree


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """Inside, what is given to the workers stays typed as common to all devices, since all of them
    are given the same: `vary` changes nothing.

    >>> with alike():
    ...     vary(jnp.ones(2))
    Array([1., 1.], dtype=float32)
    """
    before = _ALIKE.set(True)
    try:
        yield
    finally:
        _ALIKE.reset(before)


def worker_shapes(stacked: Tree) -> Tree:
    """Shapes of one worker's tree, with its sharding over the axis "model" if it has one.

    Args:
      stacked: arrays of all workers or their shapes, leaves [D, N, ...].

    Returns:
      A tree of `jax.ShapeDtypeStruct`, leaves [...].

    >>> worker_shapes(jnp.zeros((1, 8, 3)))
    ShapeDtypeStruct(shape=(3,), dtype=float32)
    """

    def one(x):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and MODEL in sharding.mesh.axis_names:
            sharding = NamedSharding(sharding.mesh, P(*sharding.spec[2:]))
            return jax.ShapeDtypeStruct(x.shape[2:], x.dtype, sharding=sharding)
        return jax.ShapeDtypeStruct(x.shape[2:], x.dtype)

    return jax.tree.map(one, stacked)


def broadcast_to_workers(tree: Tree, like: Tree) -> Tree:
    """Give an average back to every worker.

    Args:
      tree: as `Mixer.average` gives it, leaves [d or 1, n or 1, ...].
      like: a tree of all workers of the device, leaves [d, n, ...].

    Returns:
      The average with the shapes and dtypes of `like`.

    >>> broadcast_to_workers(jnp.array([[1.5]]), jnp.zeros((1, 3), jnp.bfloat16))
    Array([[1.5, 1.5, 1.5]], dtype=bfloat16)
    """
    return jax.tree.map(lambda x, y: vary(jnp.broadcast_to(x, y.shape).astype(y.dtype)), tree, like)


def weighted_sum(weight: jax.Array, x: jax.Array, over: str) -> jax.Array:
    """Sum the values of this device's workers with weights, Σ_i weight_i · x_i.

    Half-precision values are summed in float32. The sum is a dot product, which every backend does
    well (XLA's CPU reduction over a leading axis is several times slower).

    Args:
      weight: [d, n], such as `context.weight`.
      x: [d, n, ...].
      over: "workers" sums over the workers of each hub, "all" over all workers.

    Returns:
      [d, 1, ...] over "workers", [1, 1, ...] over "all"; float32 or wider. `psum` of it over the
      mesh axes is the sum over all devices.

    >>> weighted_sum(jnp.array([[0.25, 0.75]]), jnp.array([[0.0, 4.0]]), "all")
    Array([[3.]], dtype=float32)
    """
    dtype = wide(x.dtype)
    by_hub = over == "workers"
    # One long dimension is fastest, but joining dimensions would gather a sharded worker.
    flat = x if workers_are_sharded() else x.reshape((*x.shape[:2], math.prod(x.shape[2:])))
    # As einsum("dn,dn...->d...") or ("dn,dn...->..."), whose trace takes six times as long.
    axes = (((1,), (1,)), ((0,), (0,))) if by_hub else (((0, 1), (0, 1)), ((), ()))
    total = lax.dot_general(
        weight.astype(dtype), flat.astype(dtype), axes, precision=lax.Precision.HIGHEST
    )
    return total.reshape((x.shape[0] if by_hub else 1, 1) + x.shape[2:])


def workers_are_sharded() -> bool:
    """Whether, inside `over_mesh`, each worker is sharded over several devices.

    >>> workers_are_sharded()
    False
    """
    return MODEL in jax.sharding.get_abstract_mesh().auto_axes


def psum(x: jax.Array, axes: str | Sequence[str]) -> jax.Array:
    """All-reduce: the sum of x over mesh axes, common to their devices.

    As `jax.lax.psum`, inside `over_mesh`; it works on workers that are sharded over "model" too.

    >>> from jaxlocal.parallel import SINGLE, STACKED, Layout, make_mesh
    >>> mesh = make_mesh(Layout(workers_per_hub=2), jax.devices()[:1])
    >>> total = over_mesh(lambda x: psum(x.sum(1, keepdims=True), AXES), mesh, STACKED, SINGLE)
    >>> total(jnp.array([[1.0, 2.0]]))
    Array([[3.]], dtype=float32)
    """
    return _all_reduce(lax.psum, x, axes)


def pmax(x: jax.Array, axes: str | Sequence[str]) -> jax.Array:
    """All-reduce: the maximum of x over mesh axes, common to their devices.

    As `jax.lax.pmax`, inside `over_mesh`; it works on workers that are sharded over "model" too.

    >>> from jaxlocal.parallel import SINGLE, STACKED, Layout, make_mesh
    >>> mesh = make_mesh(Layout(workers_per_hub=2), jax.devices()[:1])
    >>> largest = over_mesh(lambda x: pmax(x.max(1, keepdims=True), AXES), mesh, STACKED, SINGLE)
    >>> largest(jnp.array([[1.0, 2.0]]))
    Array([[2.]], dtype=float32)
    """
    return _all_reduce(lax.pmax, x, axes)


def _all_reduce(reduce: Callable, x: jax.Array, axes: str | Sequence[str]) -> jax.Array:
    # On a mesh of 1 × 1 × model XLA cannot partition an all-reduce over the axes of workers. It can
    # partition a gather over them, which sends nothing either.
    if workers_are_sharded() and all(lax.axis_size(axis) == 1 for axis in AXES):
        return lax.all_gather(x, axes, to="invarying")[0]
    return reduce(x, axes)


def mean(params: Tree, context: Context) -> Tree:
    """Average the models of all workers, u = Σ_i a_i x_i.

    To be called inside `over_mesh`. Of integers, such as counters, and of bools it takes the
    largest over the workers, exactly; of random keys that of worker 0.

    Args:
      params: x_i, leaves [d, n, ...], or [1, 1, ...] where workers are alike.
      context: with the weights a_i.

    Returns:
      u, leaves [...], common to all workers, in the dtypes of the parameters.

    >>> from jaxlocal.parallel import CONTEXT, SINGLE, STACKED, Layout, make_mesh
    >>> layout = Layout(workers_per_hub=2, weights=[1, 3])
    >>> mesh = make_mesh(layout, jax.devices()[:1])
    >>> average = over_mesh(mean, mesh, (STACKED, CONTEXT), SINGLE)
    >>> average({"bias": jnp.array([[0.0, 4.0]])}, layout.context())
    {'bias': Array(3., dtype=float32)}
    """

    def one(x):
        if is_averaged(x):
            return _mean(x, context).astype(x.dtype)
        if not is_key(x):
            return _largest(x)
        data = jax.random.key_data(x)
        first = context.worker.reshape(context.worker.shape + (1,) * (data.ndim - 2)) == 0
        own = _largest(jnp.where(first, data, jnp.zeros_like(data)))
        return jax.random.wrap_key_data(own, impl=jax.random.key_impl(x))

    return jax.tree.map(one, params)


def _largest(x: jax.Array) -> jax.Array:
    """The maximum over all workers, in the type of the leaf."""
    # Collectives take no bools, and no integers of less than a byte.
    small = x.dtype == bool or jnp.iinfo(x.dtype).bits < 8
    return pmax((x.astype(jnp.int32) if small else x).max((0, 1)), AXES).astype(x.dtype)


def consensus_distance(params: Tree, context: Context) -> jax.Array:
    """Consensus distance √(Σ_i a_i ‖x_i − u‖²) of the workers' models from their average u.

    To be called inside `over_mesh`.

    Args:
      params: x_i, leaves [d, n, ...], or [1, 1, ...] where workers are alike; leaves that are not
        averaged, such as counters, are left out.
      context: with the weights a_i.

    Returns:
      A scalar, common to all workers; 0 at consensus.

    >>> from jaxlocal.parallel import CONTEXT, SINGLE, STACKED, Layout, make_mesh
    >>> layout = Layout(workers_per_hub=2)
    >>> mesh = make_mesh(layout, jax.devices()[:1])
    >>> distance = over_mesh(consensus_distance, mesh, (STACKED, CONTEXT), SINGLE)
    >>> distance({"bias": jnp.array([[1.0, 3.0]])}, layout.context())
    Array(1., dtype=float32)
    """

    def square(x):
        u = _mean(x, context)
        off = x.astype(u.dtype) - u[None, None]
        off = jnp.abs(off) if jnp.iscomplexobj(off) else off
        if _is_common(x, context):
            return jnp.square(off).sum()
        return weighted_sum(context.weight, jnp.square(off), "all").sum()

    squares = [square(x) for x in jax.tree.leaves(params) if is_averaged(x)]
    if not squares:
        return jnp.zeros(())
    widest = max((x.dtype for x in squares), key=lambda dtype: dtype.itemsize)
    return jnp.sqrt(psum(sum(x.astype(widest) for x in squares), AXES))


def _is_common(x: jax.Array, context: Context) -> bool:
    """Whether a leaf is one row of workers that are alike."""
    return x.shape[:2] == (1, 1) != context.weight.shape


def _mean(x: jax.Array, context: Context) -> jax.Array:
    if _is_common(x, context):
        return x[0, 0].astype(wide(x.dtype))
    return psum(weighted_sum(context.weight, x, "all"), AXES)[0, 0]
