"""The leaves of a tree by name, as they are written to disk."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.leaves import path_name
from jaxlocal.types import Leaf, Tree


def named_leaves(tree: Tree) -> dict[str, Leaf]:
    """The leaves by their paths, in which places in lists and tuples are in brackets.

    Raises:
      ConfigurationError: two leaves would have one name on disk.

    >>> named_leaves({"layers": [{"bias": 1.5}], "0": 2})
    {'0': 2, 'layers/[0]/bias': 1.5}
    >>> named_leaves({"a/b": 1, "a": {"b": 2}})
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: ['a']['b'] and ['a/b'] have the same name on disk, a/b, so
    that one of them would be lost; rename one
    """
    leaves: dict[str, Leaf] = {}
    paths: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        place, saved = jax.tree_util.keystr(path), path_name(path).replace(".", "/")
        if saved in paths:  # Orbax writes dots for slashes
            raise ConfigurationError(
                f"{paths[saved]} and {place} have the same name on disk, {saved}, so that one of "
                f"them would be lost; rename one"
            )
        paths[saved] = place
        leaves["/".join(map(_entry, path))] = leaf
    return leaves


def described(tree: Tree) -> dict[str, str]:
    """Dtype and shape of every leaf, by its name.

    >>> described({"w": np.ones((2, 3), np.float32)})
    {'w': 'float32[2, 3]'}
    """
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in named_leaves(tree).items()}


def on_host(x: Any) -> NDArray[Any]:
    """The whole array on the host; it may be sharded over devices of several processes."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def _entry(key: Any) -> str:
    in_list = isinstance(key, jax.tree_util.SequenceKey)
    return f"[{key.idx}]" if in_list else path_name((key,))
