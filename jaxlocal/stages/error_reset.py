"""Compressed messages with error reset: residuals stay in the models, and are reset in part."""

import jax
import jax.numpy as jnp

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.keys import ROUND_MESSAGE, stream_key
from jaxlocal.stages.partial_sync import (
    add_single,
    carried,
    check_common,
    compressor_memory,
    partial_sync,
    partial_sync_messages,
)
from jaxlocal.stages.sync import StatePolicy
from jaxlocal.types import Compressor, Info, Memory, Mixer, Stage


def error_reset(mixer: Mixer, compressor: Compressor | str, *, model_state: str = "keep") -> Stage:
    """Reset the errors of the workers: partially synchronise their differences from the anchor y.

        e_i = x_i − y;  y ← y + Σ_j a_j C(e_j);  x_i ← y + e_i − C(e_i)

    One anchor for all workers takes the place of an error buffer on each.

    Args:
      mixer: one that makes all workers common, such as `mixing.mean()`.
      compressor: C, C1 in CSER.
      model_state: as in `sync`.

    Returns:
      A stage of no steps, which needs the anchor.

    Raises:
      ConfigurationError: the mixer leaves workers different, so that there is no anchor. At `init`:
        parameters in half precision, in which x_i − y would lose the error.

    Source: Xie et al., "CSER: Communication-efficient SGD with Error Reset", NeurIPS 2020,
    https://arxiv.org/abs/2007.13221.

    >>> import jaxlocal
    >>> error_reset(jaxlocal.mixing.mean(), jaxlocal.compression.grbs(4)).anchored
    True
    """
    check_common("an error reset", mixer)
    compressor = carried(mixer, compressor)
    policy = StatePolicy("keep", None, model_state)

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
        error = jax.tree.map(lambda x, y: x - y[None, None], state.params, state.anchor)
        synced = partial_sync(mixer, compressor, error, memory.stacked, key, context)
        anchor = add_single(synced.add, state.anchor)
        params = jax.tree.map(lambda y, r: y[None, None] + r, anchor, synced.residual)
        state = state._replace(params=params, anchor=anchor)
        return policy.apply(state, mixer, context), Memory(stacked=synced.memory), Info()

    return Stage(init, apply, 0, _communication(mixer, compressor, policy), anchored=True)


def partial_average(
    mixer: Mixer,
    compressor: Compressor | str,
    *,
    model_state: str = "keep",
    purpose: int = ROUND_MESSAGE,
) -> Stage:
    """Average the part of the models that a compressor keeps: x_i ← Σ_j W_ji C(x_j) + x_i − C(x_i).

    The rest stays each worker's own. After an average inside hubs the workers of a hub differ, so
    that `mixing.hub_diffusion`, which takes them to be common, must not follow.

    Args:
      mixer: W.
      compressor: C.
      model_state: as in `sync`.
      purpose: the purpose of the random keys by which the mask is drawn, see `parallel.keys`.

    Returns:
      A stage of no steps.

    Raises:
      ConfigurationError: the mixer cannot carry the payload of the compressor.

    Source: Xie et al., NeurIPS 2020, https://arxiv.org/abs/2007.13221: implementation II of M-CSER.

    >>> import jaxlocal
    >>> partial_average(jaxlocal.mixing.mean(), jaxlocal.compression.grbs(4)).steps
    0
    """
    compressor = carried(mixer, compressor)
    policy = StatePolicy("keep", None, model_state)

    def apply(state, memory, batches, context):
        key = stream_key(state.key, purpose, state.step)
        synced = partial_sync(mixer, compressor, state.params, memory.stacked, key, context)
        state = state._replace(params=synced.add(synced.residual))
        return policy.apply(state, mixer, context), Memory(stacked=synced.memory), Info()

    init = lambda state: Memory(stacked=compressor_memory(compressor, state.params))
    return Stage(init, apply, 0, _communication(mixer, compressor, policy))


def _communication(mixer, compressor, policy):
    def communication(state, number=0):
        models = partial_sync_messages(mixer, compressor, state.params)
        return models + policy.messages(mixer, state)

    return communication
