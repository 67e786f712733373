"""A few numbers that tell whether two processes have trained the same model."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from jaxlocal.types import Tree

PROJECTIONS = 4  # of each leaf
# The gradient of a bias of attention keys is zero but for rounding, which Adam divides by its size.
NOISE = "queries_keys_values/bias"


def fingerprint(params: Tree, initial: Tree) -> list[float]:
    """Project how far each leaf has moved onto a few random directions, the same ones every time.

    Args:
      params, initial: models with leaves of the same names, arrays on the host.

    >>> fingerprint({"w": np.ones(3)}, {"w": np.ones(3)})
    [0.0, 0.0, 0.0, 0.0]
    """
    rng, projected = np.random.default_rng(0), []
    start = dict(jax.tree_util.tree_leaves_with_path(initial))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jax.tree_util.keystr(path, simple=True, separator="/").endswith(NOISE):
            moved = np.asarray(leaf, np.float32) - np.asarray(start[path], np.float32)
            directions = rng.standard_normal((PROJECTIONS, moved.size), np.float32)
            projected += (directions @ moved.ravel()).tolist()
    return projected


def relative_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Estimate ‖x − y‖ / ‖y − z‖ from the fingerprints of models x and y that started from z.

    >>> start, near, far = {"w": np.zeros(9)}, {"w": np.full(9, 1.01)}, {"w": np.ones(9)}
    >>> round(relative_difference(fingerprint(near, start), fingerprint(far, start)), 3)
    0.01
    """
    return math.dist(first, second) / (math.hypot(*second) or 1.0)
