"""The worker grid: who the workers are and where they live."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxlocal.errors import ConfigurationError
from jaxlocal.types import Tree, World

AXES = ("hubs", "workers")
STACKED, SINGLE = P(*AXES), P()

# What a random stream is for. Numbers are part of the format of a run: a new purpose takes a new
# number.
GRADIENT, RATE, TICK_MESSAGE, ROUND_MESSAGE = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """D hubs of N workers each, with their weights and rates.

    Args:
      hubs: D; a method without hubs has one.
      workers_per_hub: N.
      weights: w_i > 0, any shape that broadcasts to [D, N] or K numbers; the share of worker i in
        the average is a_i = w_i / Σ w.
      rates: p_i in (0, 1], likewise: the probability that worker i takes its step at a tick.

    >>> Layout(hubs=2, workers_per_hub=2, weights=[1, 1, 2, 4]).weight
    array([[0.125, 0.125],
           [0.25 , 0.5  ]])
    """

    hubs: int = 1
    workers_per_hub: int = 1
    weights: Any = 1.0
    rates: Any = 1.0

    def __post_init__(self):
        for name in ("hubs", "workers_per_hub"):
            count = getattr(self, name)
            if not isinstance(count, numbers.Integral) or count < 1:
                raise ConfigurationError(f"{name} must be an integer of at least 1, got {count!r}")
        weights, rates = self._grid("weights"), self._grid("rates")
        for wrong in weights[~((weights > 0) & np.isfinite(weights))][:1]:
            raise ConfigurationError(f"worker weights must be > 0 and finite, got {wrong}")
        for wrong in rates[~((rates > 0) & (rates <= 1))][:1]:
            raise ConfigurationError(f"worker rates must be in (0, 1], got {wrong}")
        if (self.weight < np.finfo(np.float32).tiny).any():
            raise ConfigurationError(
                f"worker weights from {weights.min()} to {weights.max()} are too far apart"
            )

    def _grid(self, field: str) -> np.ndarray:
        """The field as float64 [D, N]."""
        values = np.asarray(getattr(self, field), np.float64)
        if values.ndim == 1 and values.size == self.workers:
            values = values.reshape(self.shape)
        try:
            return np.broadcast_to(values, self.shape)
        except ValueError:
            raise ConfigurationError(
                f"{values.size} {field} do not fit {self.hubs} hubs × {self.workers_per_hub} "
                f"workers: give one, "
                f"{self.workers_per_hub} (a hub's) or {self.workers}"
            ) from None

    @property
    def shape(self) -> tuple[int, int]:
        return self.hubs, self.workers_per_hub

    @property
    def workers(self) -> int:
        """K."""
        return self.hubs * self.workers_per_hub

    @property
    def weight(self) -> np.ndarray:
        """a_i, float64 [D, N], sums to 1."""
        weights = self._grid("weights") / self._grid("weights").max()  # so that no sum overflows
        return weights / weights.sum()

    @property
    def hub_weight(self) -> np.ndarray:
        """b_d = Σ a_i over the workers of hub d, float64 [D]."""
        return self.weight.sum(axis=1)

    @property
    def rate(self) -> np.ndarray:
        """p_i, float64 [D, N]."""
        return self._grid("rates")

    def world(self, data: Tree = ()) -> World:
        """What the rounds are told of this layout, as host arrays."""
        return World(
            worker=np.arange(self.workers, dtype=np.int32).reshape(self.shape),
            weight=self.weight,
            hub_share=self.weight / self.hub_weight[:, None],
            rate=None if (self.rate == 1).all() else self.rate,
            data=data,
        )


def make_mesh(
    layout: Layout,
    devices: Sequence[jax.Device] | None = None,
    shape: tuple[int, int] | None = None,
) -> Mesh:
    """A mesh of ('hubs', 'workers') that the worker grid divides into.

    Without a shape, the one that uses the most of the devices, hubs before workers; devices that
    the grid does not divide into stay idle. With a shape, that one, or an error. Without devices,
    those of all processes, the same number of each.

    >>> make_mesh(Layout(hubs=4, workers_per_hub=3), jax.devices()[:1]).devices.shape
    (1, 1)
    """
    if devices is None:
        devices = shared_out(jax.devices(), layout.shape, shape)
    devices = list(devices)
    shape = largest_mesh(layout.shape, len(devices)) if shape is None else shape
    for name, size, count in zip(AXES, shape, layout.shape, strict=True):
        if size < 1 or count % size:
            raise ConfigurationError(
                f"{count} {name} do not divide over {size} devices of the mesh axis {name!r}"
            )
    if math.prod(shape) > len(devices):
        raise ConfigurationError(
            f"a {shape[0]} × {shape[1]} mesh needs {math.prod(shape)} devices, there are "
            f"{len(devices)}"
        )
    return Mesh(
        np.array(devices[: math.prod(shape)]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 2
    )


def shared_out(
    devices: Sequence[jax.Device], grid: tuple[int, int], shape: tuple[int, int] | None = None
) -> list[jax.Device]:
    """As many devices of one process as of the other: what the mesh of a shape, or the largest,
    takes."""
    owned: dict[int, list[jax.Device]] = {}
    for device in devices:
        owned.setdefault(device.process_index, []).append(device)
    if len(owned) == 1:
        return list(devices)
    each = min(map(len, owned.values()))
    count = math.prod(shape or largest_mesh(grid, each * len(owned), len(owned)))
    if count % len(owned):
        raise ConfigurationError(
            f"a mesh of {count} devices does not divide over {len(owned)} processes"
        )
    return [device for mine in owned.values() for device in mine[: count // len(owned)]]


def largest_mesh(grid: tuple[int, int], devices: int, processes: int = 1) -> tuple[int, int]:
    """The shape of the mesh that uses the most of so many devices, the same number of every
    process, and that a worker grid divides into, hubs before workers.

    >>> largest_mesh((2, 5), 4), largest_mesh((1, 7), 4), largest_mesh((1, 100), 64)
    ((2, 1), (1, 1), (1, 50))
    >>> largest_mesh((1, 12), 16, processes=2), largest_mesh((3, 6), 9, processes=2)
    ((1, 12), (3, 2))
    """
    divisors = [[n for n in range(1, size + 1) if size % n == 0] for size in grid]
    fits = [
        (h, w)
        for h in divisors[0]
        for w in divisors[1]
        if h * w <= devices and h * w % processes == 0
    ]
    if not fits:
        raise ConfigurationError(
            f"{grid[0]} hubs × {grid[1]} workers do not divide over {processes} processes with "
            f"{devices} devices in all"
        )
    return max(fits, key=lambda s: (s[0] * s[1], s[0]))


def stream(key: jax.Array, purpose: int, tick: Any, worker: Any = None) -> jax.Array:
    """The key of one purpose at one tick, for one worker or (without a worker) for all alike.

    A pure function of its arguments: a run that is resumed, chunked or sharded anew sees the same
    numbers.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, purpose), tick)
    return key if worker is None else jax.random.fold_in(key, worker)


_TYPED: ContextVar[bool] = ContextVar("_TYPED", default=True)


def over_mesh(fn: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """fn run on every device of the mesh, on the device's own block.

    Values are typed by the mesh axes over which they differ, which proves that what is declared
    common is. A user's loop that carries a constant fails under those types; it runs without them.
    """
    places: dict[str, Any] = {"mesh": mesh, "in_specs": in_specs, "out_specs": out_specs}

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


def one_worker(stacked: Tree) -> Tree:
    """The shapes of one worker's tree, of leaves (or shapes) [D, N, ...]."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), stacked)


def spread(tree: Tree, like: Tree) -> Tree:
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
    flat = x.reshape(x.shape[:2] + (-1,)).astype(wide)
    form = "dn,dnp->dp" if over == "workers" else "dn,dnp->p"
    total = jnp.einsum(form, weight.astype(wide), flat, precision=lax.Precision.HIGHEST)
    return total.reshape((x.shape[0] if over == "workers" else 1, 1) + x.shape[2:])


def mean(params: Tree, world: World) -> Tree:
    """u = Σ a_i x_i, leaves [...], common to all workers.

    Of values that are not floating point, such as counters, the largest.
    """

    def one(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return _mean(x, world).astype(x.dtype)
        largest = x.astype(jnp.int32).max((0, 1)) if x.dtype == bool else x.max((0, 1))
        return lax.pmax(largest, AXES).astype(x.dtype)

    return jax.tree.map(one, params)


def consensus_distance(params: Tree, world: World) -> jax.Array:
    """√(Σ a_i ‖x_i − u‖²), float [], over all leaves."""

    def square(x):
        u = _mean(x, world)
        return weighted_sum(world.weight, jnp.square(x.astype(u.dtype) - u), "all").sum()

    floats = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.sqrt(lax.psum(sum(map(square, floats)), AXES))


def _mean(x: jax.Array, world: World) -> jax.Array:
    return lax.psum(weighted_sum(world.weight, x, "all"), AXES)[0, 0]
