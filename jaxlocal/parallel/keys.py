"""Random keys that depend on purpose, step and worker alone."""

from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from jaxlocal.parallel.layout import AXES
from jaxlocal.parallel.leaves import is_key
from jaxlocal.types import Tree

# The purposes of random streams. A run's numbers depend on these numbers: never change one, and
# give a new purpose a new number.
GRADIENT, RATE, STEP_MESSAGE, ROUND_MESSAGE = 0, 1, 2, 3


def stream_key(key: jax.Array, purpose: int, step: Any, worker: Any = None) -> jax.Array:
    """Derive the random key of one purpose at one step, for one worker or for all workers.

    The key depends on the arguments alone, so that a run sees the same random numbers when it is
    resumed, divided into other chunks or sharded over other devices.

    Args:
      key: the root key of the run, `state.key`.
      purpose: GRADIENT for the loss of a worker, RATE for whether it takes its step, STEP_MESSAGE
        for what is sent at a step, ROUND_MESSAGE for what is sent at the end of a round.
      step: the number of the step, int32 [].
      worker: the number of the worker, int32 []; without it, the key is the same for all workers.

    Returns:
      A typed key.

    >>> root = jax.random.key(0)
    >>> mine, other = (stream_key(root, GRADIENT, step=7, worker=i) for i in (0, 1))
    >>> bool(mine == other), bool(mine == stream_key(root, GRADIENT, step=7, worker=0))
    (False, True)
    """
    key = jax.random.fold_in(jax.random.fold_in(key, purpose), step)
    return key if worker is None else jax.random.fold_in(key, worker)


def own_keys(stacked: Tree, alike: Collection[str] = (), raw: bool = False) -> Tree:
    """Fold the random keys in the states of all workers with their numbers.

    So each worker draws its own noise from a state that is the same on all of them. The keys of one
    worker alone stay as they are.

    Args:
      stacked: a tree of all workers, leaves [D, N, ...].
      alike: the mesh axes along which workers draw the same, since they must stay alike.
      raw: whether an untyped key, as `jax.random.PRNGKey` makes it, is taken for a key.

    Returns:
      The tree with other keys.

    >>> noise = own_keys({"key": jax.numpy.broadcast_to(jax.random.key(0), (1, 2))})["key"]
    >>> bool(noise[0, 0] == noise[0, 1])
    False
    """

    def one(x):
        if not holds_key(x, 2, raw) or not (own := _numbers(x.shape[:2], alike)).any():
            return x
        axes = x.ndim - (not is_key(x))
        fold = jax.random.fold_in
        for _ in range(axes):
            fold = jax.vmap(fold)
        return fold(x, np.broadcast_to(own.reshape(own.shape + (1,) * (axes - 2)), x.shape[:axes]))

    return jax.tree.map(one, stacked)


def holds_key(x: Any, leading: int = 0, raw: bool = True) -> bool:
    """Whether a leaf is a random key, typed or untyped.

    Args:
      x: the leaf.
      leading: how many leading dimensions are those of the grid of workers.
      raw: whether untyped keys count.

    >>> holds_key(jax.random.key(0)), holds_key(jax.random.PRNGKey(0)), holds_key(np.uint32(0))
    (True, True, False)
    """
    if is_key(x):
        return True
    words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    return raw and x.dtype == np.uint32 and x.shape[leading:] == words


def _numbers(grid: tuple[int, ...], alike: Collection[str]) -> np.ndarray:
    """The numbers of the workers, equal along the axes where they are alike, int [D, N]."""
    numbers = np.arange(np.prod(grid), dtype=np.uint32).reshape(grid)
    for axis, name in enumerate(AXES):
        if name in alike:
            numbers = numbers.take([0], axis)
    return np.broadcast_to(numbers, grid)
