"""Compressed messages with error feedback: what a message leaves out is added to the next one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlocal.errors import ConfigurationError, check_fraction
from jaxlocal.parallel.collectives import broadcast_to_workers
from jaxlocal.parallel.keys import ROUND_MESSAGE, stream_key
from jaxlocal.parallel.layout import AXES
from jaxlocal.parallel.leaves import wide
from jaxlocal.stages.compose import sequence
from jaxlocal.stages.partial_sync import (
    add_single,
    carried,
    check_common,
    compressor_memory,
    partial_sync,
    partial_sync_messages,
)
from jaxlocal.stages.sync import StatePolicy
from jaxlocal.stages.updates import apply_updates, init_of, update_of
from jaxlocal.types import Compressor, Info, Memory, Mixer, Stage, Tree


class ErrorMemory(NamedTuple):
    """What a worker carries from message to message."""

    residual: Tree  # e_i, leaves [D, N, ...], in float32 at least
    compressor: Tree  # memory of the compressor


class HubMemory(NamedTuple):
    """What error feedback inside hubs carries."""

    after: Tree  # memory of the stage that ends with the message
    errors: Memory  # of ErrorMemory


def error_feedback(
    mixer: Mixer,
    compressor: Compressor | str,
    *,
    outer_optimizer: optax.GradientTransformation | None = None,
    error_decay: float = 1.0,
    after: Stage | None = None,
    optimizer_state: str = "keep",
    optimizer: optax.GradientTransformation | None = None,
    model_state: str = "keep",
) -> Stage:
    """Send compressed differences of models, and add what a message leaves out to the next one.

        p_i = γ e_i + x_i − y;  y ← y + Σ_j W_ji C(p_j);  e_i ← p_i − C(p_i);  x_i ← y

    y is the model from which the workers started: the anchor or, where the mixer makes only the
    workers of a hub common, the model of the hub before the stage `after`.

    Args:
      mixer: W.
      compressor: C.
      outer_optimizer: takes the step of y on the pseudo-gradient −Σ_j W_ji C(p_j); by default y
        moves by the whole average. Its update is given `step`, the step of the run, for
        `scale_by_step`.
      error_decay: γ.
      after: the stage that ends with this message.
      optimizer_state, optimizer, model_state: as in `sync`.

    Returns:
      A stage of the steps of `after`, of none without it.

    Raises:
      ConfigurationError: the mixer averages inside hubs, and `after` is missing or an outer
        optimizer, which needs an anchor, is given; or the decay is not in [0, 1].

    Source: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", NeurIPS 2018,
    https://arxiv.org/abs/1809.07599; Karimireddy et al., ICML 2019, https://arxiv.org/abs/1901.09847.

    >>> import jaxlocal
    >>> error_feedback(jaxlocal.mixing.mean(), jaxlocal.compression.top_k(64)).anchored
    True
    """
    compressor = carried(mixer, compressor)
    check_fraction("the decay of errors", error_decay)
    policy = StatePolicy(optimizer_state, optimizer, model_state)
    if set(mixer.axes) == set(AXES):
        stage = _from_anchor(mixer, compressor, outer_optimizer, error_decay, policy)
        return sequence(after, stage) if after else stage
    if after is None or outer_optimizer is not None:
        check_common("error feedback from an anchor", mixer)
    if "workers" not in mixer.axes:
        raise ConfigurationError(
            f"error feedback needs a mixer that makes the workers of a hub common; this one makes "
            f"them common over {mixer.axes}"
        )
    return _from_hub(mixer, compressor, error_decay, after, policy)


def common_decay(decay_optimizer: optax.GradientTransformation) -> Stage:
    """Let all models decay by the same amount, which no message has to carry.

        d = decay(0, y);  y ← y + d;  x_i ← x_i + d

    y is the anchor. x_i − y stays as it is, so that weight decay does not pass through the
    compressor of `error_feedback`.

    Args:
      decay_optimizer: any optax transformation; it is given gradients of zero at y, and `step` of
        the local step before. Its state exists once, for all workers.

    Returns:
      A stage of no steps, to follow a local step; it needs the anchor.

    Source: the code released with Xie et al., NeurIPS 2020, https://arxiv.org/abs/2007.13221, for
    EF-SGD.

    >>> common_decay(optax.chain(optax.add_decayed_weights(5e-4), optax.scale(-0.1))).anchored
    True
    """
    update = update_of(decay_optimizer, "decay optimizer")

    def apply(state, memory, batches, context):
        zeros = jax.tree.map(jnp.zeros_like, state.anchor)
        moves, memory = update(zeros, memory.single, state.anchor, step=state.step - 1)
        anchor = apply_updates(state.anchor, moves)
        move = lambda x, d: x + d.astype(x.dtype)[None, None]
        params = jax.tree.map(move, state.params, moves)
        return state._replace(params=params, anchor=anchor), Memory(single=memory), Info()

    init = lambda state: Memory(single=init_of(decay_optimizer, state.anchor))
    return Stage(init, apply, 0, lambda state, number=0: [], anchored=True)


def _from_anchor(mixer, compressor, outer_optimizer, error_decay, policy) -> Stage:
    if outer_optimizer is not None:
        update = update_of(outer_optimizer, "outer optimizer")

    def init(state):
        outer = init_of(outer_optimizer, state.anchor) if outer_optimizer is not None else ()
        return Memory(no_errors(compressor, state.params), single=outer)

    def apply(state, memory, batches, context):
        errors, outer = memory
        start = jax.tree.map(lambda x, y: y.astype(x.dtype)[None, None], state.params, state.anchor)
        move = with_errors(error_decay, errors.residual, state.params, start)
        key = stream_key(state.key, ROUND_MESSAGE, state.step)
        synced = partial_sync(mixer, compressor, move, errors.compressor, key, context)
        if outer_optimizer is not None:
            average = add_single(synced.add, jax.tree.map(jnp.zeros_like, state.anchor))
            gradient = jax.tree.map(jnp.negative, average)
            updates, outer = update(gradient, outer, state.anchor, step=state.step - 1)
            anchor = apply_updates(state.anchor, updates)
        else:
            anchor = add_single(synced.add, state.anchor)
        params = broadcast_to_workers(jax.tree.map(lambda y: y[None, None], anchor), state.params)
        state = state._replace(params=params, anchor=anchor)
        memory = Memory(ErrorMemory(synced.residual, synced.memory), outer)
        return policy.apply(state, mixer, context), memory, Info()

    communication = _communication(mixer, compressor, policy)
    return Stage(init, apply, 0, communication, anchored=True)


def _from_hub(mixer, compressor, error_decay, after, policy) -> Stage:
    def init(state):
        return HubMemory(after.init(state), Memory(no_errors(compressor, state.params)))

    def apply(state, memory, batches, context):
        start, errors = state.params, memory.errors.stacked
        state, own, info = after.apply(state, memory.after, batches, context)
        move = with_errors(error_decay, errors.residual, state.params, start)
        key = stream_key(state.key, ROUND_MESSAGE, state.step)
        synced = partial_sync(mixer, compressor, move, errors.compressor, key, context)
        hubs = synced.add(jax.tree.map(lambda x: x[:, :1], start))
        state = state._replace(params=broadcast_to_workers(hubs, start))
        memory = HubMemory(own, Memory(ErrorMemory(synced.residual, synced.memory)))
        return policy.apply(state, mixer, context), memory, info

    own = _communication(mixer, compressor, policy)
    communication = lambda state, number=0: [*after.communication(state, number), *own(state)]
    return after._replace(init=init, apply=apply, communication=communication)


def no_errors(compressor: Compressor, params: Tree) -> ErrorMemory:
    """The memory before the first message; params lead with the worker grid."""
    residual = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), error_shapes(params))
    return ErrorMemory(residual, compressor_memory(compressor, residual))


def error_shapes(params: Tree) -> Tree:
    """The shapes of errors, which are kept and sent in float32 at least."""
    one = lambda x: jax.ShapeDtypeStruct(x.shape, wide(x.dtype))
    return jax.tree.map(one, params)


def _communication(mixer, compressor, policy):
    def communication(state, number=0):
        errors = partial_sync_messages(mixer, compressor, error_shapes(state.params))
        return errors + policy.messages(mixer, state)

    return communication


def with_errors(error_decay, residual, params, start):
    """γ e_i + x_i − y, the differences with what earlier messages left out; leaves [d, n, ...]."""
    one = lambda e, x, y: error_decay * e + (x.astype(e.dtype) - y.astype(e.dtype))
    return jax.tree.map(one, residual, params, start)
