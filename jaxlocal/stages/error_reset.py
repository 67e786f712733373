"""Compressed messages with error reset: what a message leaves out is applied at once, and reset."""

import jax
import jax.numpy as jnp

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.keys import ROUND_MESSAGE, stream_key
from jaxlocal.stages.error_feedback import _says
from jaxlocal.stages.partial_sync import (
    add_single,
    check_common,
    check_exchange,
    compressor_memory,
    partial_sync,
)
from jaxlocal.stages.sync import Others
from jaxlocal.types import Compressor, Info, Memory, Mixer, Stage


def partial_average(
    mixer: Mixer,
    compressor: Compressor,
    model_state: str = "keep",
    purpose: int = ROUND_MESSAGE,
) -> Stage:
    """Partial synchronisation of models: x_i ← Σ_j W_ji C(x_j) + x_i − C(x_i).

    Averages the part of the models that C keeps; what it does not keep stays each worker's own.
    With hub averages the workers of a hub differ afterwards, so that `mixing.hub_diffusion`, which
    takes them to be alike, must not follow.

    Args:
      purpose: that of the random stream which the mask is drawn from.
    """
    check_exchange(mixer, compressor)
    others = Others("keep", None, model_state)

    def apply(state, memory, batches, context):
        key = stream_key(state.key, purpose, state.step)
        synced = partial_sync(mixer, compressor, state.params, memory.stacked, key, context)
        state = state._replace(params=synced.add(synced.residual))
        return others.treat(state, mixer, context), Memory(stacked=synced.memory), Info()

    init = lambda state: Memory(stacked=compressor_memory(compressor, state.params))
    return Stage(init, apply, 0, _says(mixer, compressor, others))


def error_reset(mixer: Mixer, compressor: Compressor, model_state: str = "keep") -> Stage:
    """Error reset: partial synchronisation of what workers differ by from the anchor y.

        e_i = x_i − y;  y ← y + Σ_j a_j C(e_j);  x_i ← y + e_i − C(e_i)

    The anchor, one for all, takes the place of an error buffer a worker.

    Args:
      mixer: one that makes all workers common.
      compressor: C, C1 in the paper.

    Raises:
      ConfigurationError: the mixer leaves workers unlike, so that there is no anchor; or parameters
        in half precision, in which x_i − y would lose the error.
    """
    check_common("an error reset", mixer)
    check_exchange(mixer, compressor)
    others = Others("keep", None, model_state)

    def init(state):
        for x in jax.tree.leaves(state.params):
            if jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32:
                raise ConfigurationError(
                    f"an error reset keeps its errors in the parameters, which {x.dtype} is too "
                    f"coarse for; take float32 and compute in {x.dtype}"
                )
        return Memory(stacked=compressor_memory(compressor, state.params))

    def apply(state, memory, batches, context):
        key = stream_key(state.key, ROUND_MESSAGE, state.step)
        error = jax.tree.map(lambda x, y: x - y, state.params, state.anchor)
        synced = partial_sync(mixer, compressor, error, memory.stacked, key, context)
        anchor = add_single(synced.add, state.anchor)
        params = jax.tree.map(lambda y, r: y + r, anchor, synced.residual)
        state = state._replace(params=params, anchor=anchor)
        return others.treat(state, mixer, context), Memory(stacked=synced.memory), Info()

    return Stage(init, apply, 0, _says(mixer, compressor, others), anchored=True)
