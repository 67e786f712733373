"""Random keys as a pure function of purpose, step and worker."""

from typing import Any

import jax

# What a random stream is for. Numbers are part of the format of a run: a new purpose takes a new
# number.
GRADIENT, RATE, STEP_MESSAGE, ROUND_MESSAGE = 0, 1, 2, 3


def stream_key(key: jax.Array, purpose: int, step: Any, worker: Any = None) -> jax.Array:
    """The key of one purpose at one step, for one worker or (without a worker) for all alike.

    A pure function of its arguments: a run that is resumed, chunked or sharded anew sees the same
    numbers.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, purpose), step)
    return key if worker is None else jax.random.fold_in(key, worker)
