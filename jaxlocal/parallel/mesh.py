"""Where workers live: the mesh, which may span processes, and how host arrays come onto it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.layout import AXES, MODEL, SINGLE, STACKED, Layout
from jaxlocal.types import Tree


def make_mesh(
    layout: Layout,
    devices: Sequence[jax.Device] | None = None,
    shape: Sequence[int] | None = None,
) -> Mesh:
    """A mesh of ('hubs', 'workers') that the worker grid divides into.

    Without a shape, the one that uses the most of the devices, hubs before workers; devices that
    the grid does not divide into stay idle. With a shape, that one, or an error. A third entry
    greater than 1 is the size of a last axis, 'model': every worker is then split over so many
    neighbouring devices. Without devices, those of all processes, the same number of each.

    >>> make_mesh(Layout(hubs=4, workers_per_hub=3), jax.devices()[:1]).devices.shape
    (1, 1)
    """
    if devices is None:
        devices = balanced_devices(jax.devices(), layout.shape, shape)
    devices = list(devices)
    shape = tuple(largest_mesh(layout.shape, len(devices)) if shape is None else shape)
    _check_mesh(layout, shape, len(devices))
    if shape[2:] == (1,):
        shape = shape[:2]
    grid = np.array(devices[: math.prod(shape)]).reshape(shape)
    return Mesh(grid, (*AXES, MODEL)[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def _check_mesh(layout: Layout, shape: tuple[int, ...], devices: int) -> None:
    named = " × ".join(map(str, shape))
    if len(shape) not in (2, 3):
        raise ConfigurationError(f"a mesh is hubs × workers or hubs × workers × model, got {named}")
    for name, size, count in zip(AXES, shape, layout.shape, strict=False):
        if size < 1 or count % size:
            raise ConfigurationError(
                f"{count} {name} do not divide over {size} devices of the mesh axis {name!r}"
            )
    if shape[-1] < 1:
        raise ConfigurationError(f"a worker cannot be split over {shape[-1]} devices")
    if math.prod(shape) > devices:
        raise ConfigurationError(
            f"a {named} mesh needs {math.prod(shape)} devices, there are {devices}"
        )


def balanced_devices(
    devices: Sequence[jax.Device], grid: tuple[int, int], shape: Sequence[int] | None = None
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


def place(tree: Tree, shardings: Any) -> Tree:
    """The arrays on the devices of their shardings, a prefix of the tree.

    As `jax.device_put`, but for a sharding that spans processes: there every process gives the same
    arrays, of which the rows of its own devices are read, and nothing is said between processes to
    compare them. What spans processes already is resharded, if need be.
    """
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        return jax.device_put(tree, shardings)
    over = lambda sharding, part: jax.tree.map(lambda x: _spanning(x, sharding), part)
    return jax.tree.map(over, shardings, tree)


def _spanning(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        same = x.sharding.is_equivalent_to(sharding, x.ndim)
        return x if same else jax.jit(lambda x: x, out_shardings=sharding)(x)
    if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _spanning(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x)
        )
    values = np.asarray(x)
    dtype = jax.dtypes.canonicalize_dtype(values.dtype)
    part = lambda index: values[index].astype(dtype, copy=False)
    return jax.make_array_from_callback(values.shape, sharding, part)


def wait_on_cpu_processes(mesh: Mesh, results: Tree) -> Tree:
    """What a program on the mesh has given, to be had before the next program starts where the mesh
    is of CPUs in several processes: their collectives occupy the threads of the host, and those of
    programs that run ahead can wait for each other for ever."""
    waits = mesh.is_multi_process and mesh.devices.flat[0].platform == "cpu"
    return jax.block_until_ready(results) if waits else results


def local_rows(mesh: Mesh, grid: tuple[int, ...], spec: P = STACKED) -> np.ndarray:
    """The numbers, row by row, of the places of a grid that lie on this process's devices.

    >>> local_rows(Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("hubs", "workers")), (2, 3))
    array([0, 1, 2, 3, 4, 5])
    """
    numbers = np.arange(math.prod(grid)).reshape(grid)
    parts = NamedSharding(mesh, spec).addressable_devices_indices_map(grid).values()
    return np.unique(np.concatenate([[], *(numbers[part].ravel() for part in parts)])).astype(int)


def place_rows(
    tree: Tree,
    mesh: Mesh,
    grid: tuple[int, ...],
    spec: P = STACKED,
    axis: int = 0,
    within: P = SINGLE,
) -> Tree:
    """Arrays of which this process holds only its own rows, as arrays over the whole grid.

    Args:
      tree: host arrays, leaves [..., rows, ...] with the `local_rows` of the grid at an axis.
      spec: how the grid is spread over the mesh.
      axis: which of the leaves'; what stands before is whole everywhere.
      within: how what stands after it is spread.

    Returns:
      Global arrays, leaves [..., *grid, ...].
    """
    rows = local_rows(mesh, grid, spec)
    numbers = np.arange(math.prod(grid)).reshape(grid)
    sharding = NamedSharding(mesh, P(*(None,) * axis, *spec, *within))

    def one(x):
        shape = x.shape[:axis] + grid + x.shape[axis + 1 :]
        if sharding.is_fully_addressable:
            return jax.device_put(x.reshape(shape), sharding)
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)

        def part(index):
            places = np.searchsorted(rows, numbers[index[axis : axis + len(grid)]])
            before, after = (slice(None),) * (axis + places.ndim), index[axis + len(grid) :]
            return x.take(places, axis)[(*before, *after)].astype(dtype, copy=False)

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(one, tree)
