"""The mesh of devices, which may span processes, and the placement of host arrays on it."""

import contextlib
import math
from collections.abc import Callable, Sequence
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
    """Make a mesh of devices with the axes 'hubs' and 'workers' for a layout of workers.

    Args:
      layout: the workers; each axis of the mesh divides the same axis of their grid.
      devices: the devices to use; by default those of all processes, the same number of each.
      shape: hubs × workers, or hubs × workers × model, where 'model' is a third axis: every worker
        is then sharded over that many neighbouring devices. By default the hubs × workers that use
        most of the devices, hubs before workers; devices left over stay idle.

    Returns:
      A mesh of two axes, or of three where the third size is greater than 1.

    Raises:
      ConfigurationError: the grid does not divide over the shape, or there are too few devices.

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
        raise ConfigurationError(f"a worker cannot be sharded over {shape[-1]} devices")
    if math.prod(shape) > devices:
        raise ConfigurationError(
            f"a {named} mesh needs {math.prod(shape)} devices, and there are {devices}"
        )


def balanced_devices(
    devices: Sequence[jax.Device], grid: tuple[int, int], shape: Sequence[int] | None = None
) -> list[jax.Device]:
    """Choose devices for a mesh, the same number from every process.

    Args:
      devices: those of all processes.
      grid: (D, N), the grid of workers.
      shape: of the mesh; by default the largest that the grid divides over.

    Returns:
      The devices in the order of the mesh; all of them where there is one process.

    Raises:
      ConfigurationError: a mesh of the shape does not divide over the processes.

    >>> balanced_devices(jax.devices()[:1], (1, 4)) == jax.devices()[:1]
    True
    """
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
    """Find the shape of the largest mesh that a grid of workers divides over.

    Args:
      grid: (D, N), the grid of workers.
      devices: the number of devices of all processes together.
      processes: the number of processes; each gives the same number of devices.

    Returns:
      Hubs × workers; where several shapes use as many devices, the one with most hubs.

    Raises:
      ConfigurationError: no mesh divides over the processes.

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
    """Place arrays on the devices of a mesh, which may span processes.

    As `jax.device_put`, except where a sharding spans processes. There every process passes the
    same arrays and reads the rows of its own devices, without a comparison of the arrays. Arrays
    that span processes already are resharded if their sharding differs.

    Args:
      tree: arrays of the host or of devices.
      shardings: a prefix of the tree.

    Returns:
      The arrays with those shardings.

    >>> mesh = make_mesh(Layout(), jax.devices()[:1])
    >>> place(np.arange(3), NamedSharding(mesh, SINGLE))
    Array([0, 1, 2], dtype=int32)
    """
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        return jax.device_put(tree, shardings)
    over = lambda sharding, part: jax.tree.map(lambda x: _spanning(x, sharding), part)
    return jax.tree.map(over, shardings, tree)


def _spanning(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        same = x.sharding.is_equivalent_to(sharding, x.ndim)
        assert isinstance(sharding.mesh, Mesh)
        return x if same else jit_on(sharding.mesh, lambda x: x, out_shardings=sharding)(x)
    if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _spanning(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x)
        )
    values = np.asarray(x)
    dtype = jax.dtypes.canonicalize_dtype(values.dtype)
    part = lambda index: values[index].astype(dtype, copy=False)
    return jax.make_array_from_callback(values.shape, sharding, part)


class jit_on:
    """`jax.jit` of a function of arrays on a mesh, whatever mesh the caller works on.

    In `jax.set_mesh` of another mesh, `jax.jit` would compile for that one, and fail.

    Args:
      mesh: the mesh of the function.
      fn: the function.
      **options: of `jax.jit`.

    >>> mesh = make_mesh(Layout(), jax.devices()[:1])
    >>> with jax.set_mesh(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])):
    ...     jit_on(mesh, lambda x: 2 * x)(np.ones(2))
    Array([2., 2.], dtype=float32)
    """

    def __init__(self, mesh: Mesh, fn: Callable[..., Any], **options: Any) -> None:
        self._mesh, self._jitted = mesh, jax.jit(fn, **options)

    def __call__(self, *arguments: Any) -> Any:
        with on_mesh(self._mesh):
            return self._jitted(*arguments)

    def lower(self, *arguments: Any) -> Any:
        """As that of `jax.jit`."""
        with on_mesh(self._mesh):
            return self._jitted.lower(*arguments)

    def eval_shape(self, *arguments: Any) -> Any:
        """As that of `jax.jit`."""
        with on_mesh(self._mesh):
            return self._jitted.eval_shape(*arguments)


def on_mesh(mesh: Mesh) -> Any:
    """A context in which programs of a mesh run, whatever mesh the caller has set.

    >>> with on_mesh(make_mesh(Layout(), jax.devices()[:1])):
    ...     jax.jit(lambda x: 2 * x)(np.ones(2))
    Array([2., 2.], dtype=float32)
    """
    current: Any = jax.sharding.get_abstract_mesh()
    if current.empty:
        return contextlib.nullcontext()
    try:
        return jax.set_mesh(mesh)
    except ValueError:  # inside jax.jit
        if current == mesh.abstract_mesh:
            return contextlib.nullcontext()
        raise ConfigurationError(
            f"inside jax.jit a round runs on the mesh of jax.set_mesh, {current.shape}, its own is "
            f"{mesh.abstract_mesh.shape}: set none, or round_fn.mesh"
        ) from None


def wait_on_cpu_processes(mesh: Mesh, results: Tree) -> Tree:
    """Wait for the results of a program if the mesh is of CPUs in several processes.

    There, collectives occupy the threads of the host, and programs that run ahead of each other can
    deadlock. On other meshes the next program is dispatched while this one runs.

    >>> wait_on_cpu_processes(make_mesh(Layout(), jax.devices()[:1]), jax.numpy.ones(1))
    Array([1.], dtype=float32)
    """
    waits = mesh.is_multi_process and mesh.devices.flat[0].platform == "cpu"
    return jax.block_until_ready(results) if waits else results


def local_rows(mesh: Mesh, grid: tuple[int, ...], spec: P = STACKED) -> np.ndarray:
    """Numbers of the workers, or of other rows of a grid, that lie on this process's devices.

    Args:
      mesh: as `make_mesh` gives it.
      grid: the shape of the grid, (D, N) for workers.
      spec: how the grid is sharded over the mesh.

    Returns:
      Their numbers in row-major order, int [rows], ascending.

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
    """Place arrays of which each process holds only the rows of its own devices.

    Args:
      tree: host arrays, leaves [..., rows, ...], whose rows are the `local_rows` of the grid.
      mesh: as `make_mesh` gives it.
      grid: the shape of the grid, (D, N) for workers.
      spec: how the grid is sharded over the mesh.
      axis: which axis of the leaves holds the rows; axes before it are not sharded.
      within: how the axes after it are sharded.

    Returns:
      Global arrays, leaves [..., *grid, ...].

    >>> mesh = make_mesh(Layout(workers_per_hub=2), jax.devices()[:1])
    >>> place_rows(np.zeros((5, 2, 3)), mesh, (1, 2), axis=1).shape  # [steps, D, N, features]
    (5, 1, 2, 3)
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
