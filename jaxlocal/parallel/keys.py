"""Random keys that depend on purpose, step and worker alone."""

from typing import Any

import jax

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
