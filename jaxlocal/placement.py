"""How host arrays come onto a mesh, which may span processes: each process moves only what lies on
its own devices."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlocal.types import Tree
from jaxlocal.workers import STACKED


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


def local_rows(mesh: Mesh, grid: tuple[int, ...], spec: P = STACKED) -> np.ndarray:
    """The numbers, row by row, of the places of a grid that lie on this process's devices.

    >>> local_rows(Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("hubs", "workers")), (2, 3))
    array([0, 1, 2, 3, 4, 5])
    """
    numbers = np.arange(math.prod(grid)).reshape(grid)
    parts = NamedSharding(mesh, spec).addressable_devices_indices_map(grid).values()
    return np.unique(np.concatenate([[], *(numbers[part].ravel() for part in parts)])).astype(int)


def place_rows(tree: Tree, mesh: Mesh, grid: tuple[int, ...], spec: P = STACKED, axis: int = 0):
    """Arrays of which this process holds only its own rows, as arrays over the whole grid.

    Args:
      tree: host arrays, leaves [..., rows, ...] with the `local_rows` of the grid at an axis.
      spec: how the grid is spread over the mesh.
      axis: which of the leaves'; what stands before is whole everywhere.

    Returns:
      Global arrays, leaves [..., *grid, ...].
    """
    rows = local_rows(mesh, grid, spec)
    numbers = np.arange(math.prod(grid)).reshape(grid)
    sharding = NamedSharding(mesh, P(*(None,) * axis, *spec))

    def one(x):
        shape = x.shape[:axis] + grid + x.shape[axis + 1 :]
        if sharding.is_fully_addressable:
            return jax.device_put(x.reshape(shape), sharding)
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)

        def part(index):
            places = np.searchsorted(rows, numbers[index[axis : axis + len(grid)]])
            return x.take(places, axis).astype(dtype, copy=False)

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(one, tree)
