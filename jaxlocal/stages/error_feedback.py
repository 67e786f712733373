"""Compressed messages with error feedback: what a message leaves out is added to the next."""

import jax
import jax.numpy as jnp
import optax

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.collectives import broadcast_to_workers
from jaxlocal.parallel.keys import ROUND_MESSAGE, stream_key
from jaxlocal.parallel.layout import AXES
from jaxlocal.stages.compose import sequence
from jaxlocal.stages.partial_sync import (
    add_single,
    check_common,
    check_exchange,
    compressor_memory,
    partial_sync,
    partial_sync_messages,
)
from jaxlocal.stages.sync import Others
from jaxlocal.types import Compressor, Info, Memory, Mixer, Stage


def error_feedback(
    mixer: Mixer,
    compressor: Compressor,
    outer_optimizer: optax.GradientTransformation | None = None,
    error_decay: float = 1.0,
    after: Stage | None = None,
    optimizer_state: str = "keep",
    optimizer: optax.GradientTransformation | None = None,
    model_state: str = "keep",
) -> Stage:
    """Error feedback: what a message leaves out is added to the next one.

        p_i = γ e_i + x_i − y;  y ← y + Σ_j W_ji C(p_j);  e_i ← p_i − C(p_i);  x_i ← y

    y is the model from which the workers started: the anchor or, where the mixer makes only the
    workers of a hub common, the hub's model before the stage `after`.

    Args:
      compressor: C.
      outer_optimizer: makes the step of y from the pseudo-gradient −Σ W_ji C(p_j); by default y
        moves by the whole of what is heard. It is told the run's step, for `scale_by_step`.
      error_decay: γ.
      after: the stage that ends with this message.
      optimizer_state, optimizer, model_state: what happens to the workers' own, as in
        `syncing.sync`.

    Raises:
      ConfigurationError: a mixer over hubs without the stage since they were alike, or with an
        outer optimizer, which needs an anchor.
    """
    check_exchange(mixer, compressor)
    if not 0 <= error_decay <= 1:
        raise ConfigurationError(f"the decay of errors must be in [0, 1], got {error_decay}")
    others = Others(optimizer_state, optimizer, model_state)
    if set(mixer.axes) == set(AXES):
        stage = _from_anchor(mixer, compressor, outer_optimizer, error_decay, others)
        return sequence(after, stage) if after else stage
    if after is None or outer_optimizer:
        check_common("error feedback from an anchor", mixer)
    if "workers" not in mixer.axes:
        raise ConfigurationError(
            f"error feedback needs a mixer that makes the workers of a hub common; this one does "
            f"over {mixer.axes}"
        )
    return _from_start(mixer, compressor, error_decay, after, others)


def _from_anchor(mixer, compressor, outer_optimizer, error_decay, others) -> Stage:
    if outer_optimizer:
        update = optax.with_extra_args_support(outer_optimizer).update

    def init(state):
        outer = outer_optimizer.init(state.anchor) if outer_optimizer else ()
        return Memory(_errors(compressor, state.params), single=outer)

    def apply(state, memory, batches, context):
        (errors, kept), outer = memory
        start = jax.tree.map(lambda x, y: y.astype(x.dtype), state.params, state.anchor)
        moved = _moved(error_decay, errors, state.params, start)
        key = stream_key(state.key, ROUND_MESSAGE, state.step)
        synced = partial_sync(mixer, compressor, moved, kept, key, context)
        if outer_optimizer:
            heard = add_single(synced.add, jax.tree.map(jnp.zeros_like, state.anchor))
            gradient = jax.tree.map(jnp.negative, heard)
            updates, outer = update(gradient, outer, state.anchor, step=state.step - 1)
            anchor = optax.apply_updates(state.anchor, updates)
        else:
            anchor = add_single(synced.add, state.anchor)
        params = broadcast_to_workers(jax.tree.map(lambda y: y[None, None], anchor), state.params)
        state = state._replace(params=params, anchor=anchor)
        memory = Memory((synced.residual, synced.memory), outer)
        return others.treat(state, mixer, context), memory, Info()

    return Stage(init, apply, 0, _says(mixer, compressor, others, _wide), anchored=True)


def _from_start(mixer, compressor, error_decay, after, others) -> Stage:
    def init(state):
        return after.init(state), Memory(_errors(compressor, state.params))

    def apply(state, memory, batches, context):
        own, ((errors, kept), _) = memory
        start = state.params
        state, own, info = after.apply(state, own, batches, context)
        moved = _moved(error_decay, errors, state.params, start)
        key = stream_key(state.key, ROUND_MESSAGE, state.step)
        synced = partial_sync(mixer, compressor, moved, kept, key, context)
        hubs = synced.add(jax.tree.map(lambda x: x[:, :1], start))
        state = state._replace(params=broadcast_to_workers(hubs, start))
        memory = (own, Memory((synced.residual, synced.memory)))
        return others.treat(state, mixer, context), memory, info

    own = _says(mixer, compressor, others, _wide)
    communication = lambda state, number=0: [*after.communication(state, number), *own(state)]
    return Stage(init, apply, after.steps, communication, after.anchored, after.turns)


def _says(mixer, compressor, others, of=lambda params: params):
    def communication(state, number=0):
        return partial_sync_messages(mixer, compressor, of(state.params)) + others.said(
            mixer, state
        )

    return communication


def _wide(params):
    """The shapes of errors, which are kept and sent in float32 at least."""
    wide = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    return jax.tree.map(wide, params)


def _errors(compressor, params):
    """No errors yet, and what the compressor keeps."""
    errors = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _wide(params))
    return errors, compressor_memory(compressor, errors)


def _moved(error_decay, errors, params, start):
    """γ e_i + x_i − y, leaves [d, n, ...]."""
    one = lambda e, x, y: error_decay * e + (x.astype(e.dtype) - y.astype(e.dtype))
    return jax.tree.map(one, errors, params, start)
