"""The local step."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.collectives import one_worker, spread, vary
from jaxlocal.parallel.keys import GRADIENT, RATE, STEP_MESSAGE, stream
from jaxlocal.parallel.pool import fetch
from jaxlocal.parallel.worker_maps import block_size, over_workers, worker_map_for
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.partial_sync import (
    add_single,
    aggregate,
    check_common,
    check_exchange,
    compress,
    compressor_memory,
    partial_sync,
    partial_sync_messages,
)
from jaxlocal.types import Compressor, Info, Memory, Message, Mixer, Stage


def local_step(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    gradient_mixer: Mixer | None = None,
    worker_map: str | None = None,
    update_mixer: Mixer | None = None,
    compressor: Compressor | None = None,
) -> Stage:
    """One step: each worker i takes x_i ← optimizer(x_i, g_i) with probability p_i, else it stays.

    With a gradient mixer the gradients (or Σ a_j C(g_j), without feedback of what that loses) are
    averaged before the optimizer, every worker takes the step, and a worker that skips its step
    contributes a gradient of zero.

    With an update mixer the optimizers' updates u_i are partially synchronised:

        x_i ← x_i + Σ_j a_j C(u_j) + u_i − C(u_i);  an anchor that exists moves by Σ_j a_j C(u_j)

    A worker that skips its step then says an update of zero, keeps its optimizer's state, and
    hears the others' as ever.

    Args:
      grad_fn: as `gradients` makes it; batches of indices are looked up in `world.data` before it
        is called.
      optimizer: any optax transformation; mapped over workers, so that norms are a worker's own. It
        is told the step, and the loss and gradient as `value` and `grad`.
      worker_map: "vmap", "map" or "blocks:N"; by default what is fast for grad_fn on this backend.
      compressor: C, of what the mixer averages; the updates' must be given.

    Reports per worker "active" (1 where it took its step) and the metrics of grad_fn (0 where it
    did not).
    """
    if worker_map is not None:
        block_size(worker_map)
    update_fn = optax.with_extra_args_support(optimizer).update
    mixer = update_mixer or gradient_mixer
    _check_sync(gradient_mixer, update_mixer, compressor)

    def init(state):
        if compressor is None:
            return ()
        return Memory(stacked=compressor_memory(compressor, state.params))

    def apply(state, memory, batches, context):
        batch = jax.tree.map(lambda b: b[0], batches)
        one = _one_worker(grad_fn, update_fn, state, context)
        arguments = (state.params, state.model_state, batch, context.worker)
        mode = worker_map or worker_map_for(
            one.gradient, *jax.tree.map(lambda x: x[0, 0], arguments)
        )
        if mixer is None:
            return _local_step(one, state, memory, batch, context, mode)
        step = _exchanged_step if update_mixer else _averaged_step
        return step(one, state, memory, batch, context, mode, mixer, compressor)

    def communication(state, number=0):
        if mixer is None:
            return []
        if compressor is None:
            return [Message(mixer, one_worker(state.params))]
        return partial_sync_messages(mixer, compressor, state.params)

    return Stage(init, apply, 1, communication)


def _check_sync(gradient_mixer, update_mixer, compressor):
    if gradient_mixer and update_mixer:
        raise ConfigurationError("a step averages gradients or updates, and both were asked for")
    if update_mixer and compressor is None:
        raise ConfigurationError("a step averages updates with a compressor, and none was given")
    if compressor and not (gradient_mixer or update_mixer):
        raise ConfigurationError(
            f"a compressor needs a mixer of gradients or updates, and {compressor.name} has none"
        )
    if compressor:
        check_exchange(update_mixer or gradient_mixer, compressor)
    if update_mixer:
        check_common("a partial synchronisation of updates", update_mixer)
    if compressor and gradient_mixer and not compressor.unbiased:
        warnings.warn(
            f"{compressor.name} is biased, and without error feedback what it leaves out of the "
            f"gradients is lost: such a run may stall or diverge where ef_sgd and cser converge",
            stacklevel=4,
        )


class _OneWorker(NamedTuple):
    """What a worker does at this step."""

    gradient: Callable  # (params, model_state, batch, worker) -> (grads, model_state, metrics)
    update: Callable  # (grads, opt_state, params, loss) -> (updates, opt_state)
    active: Callable  # (worker, rate) -> whether it takes its step; True where all always do


def _one_worker(grad_fn, update_fn, state, context) -> _OneWorker:
    def gradient(params, model_state, batch, worker):
        key = stream(state.key, GRADIENT, state.step, worker)
        return grad_fn(params, model_state, fetch(context.data, batch), key)

    def update(grads, opt_state, params, loss):
        told = {"step": state.step, "value": loss, "grad": grads}
        return update_fn(grads, opt_state, params, **told)

    def active(worker, rate):
        if rate is None:
            return True
        key = stream(state.key, RATE, state.step, worker)
        return jax.random.uniform(key, dtype=rate.dtype) < rate

    return _OneWorker(gradient, update, active)


def _local_step(one, state, memory, batch, context, mode):
    """Gradient and update in one pass over the workers, so that a loop keeps one gradient alive."""
    step = _stepped(one, mode, optax.apply_updates, lambda params: params)
    places = (state.params, state.opt_state, state.model_state, batch, context.worker, context.rate)
    return _advance(state, memory, *over_workers(step, mode, kept=3)(*places))


def _stepped(one, mode, taken, stayed):
    """The step of one worker, if it takes it: (what `taken(params, updates)` makes of it or else
    `stayed(params)`, its optimizer's state, model state and metrics)."""

    def step(params, opt_state, model_state, batch, worker, rate):
        def take():
            grads, new_state, metrics = one.gradient(params, model_state, batch, worker)
            updates, new_opt_state = one.update(grads, opt_state, params, metrics.get("loss"))
            return taken(params, updates), new_opt_state, new_state, metrics

        stay = lambda _: (stayed(params), opt_state, model_state)
        return _if_active(one.active(worker, rate), mode, take, stay)

    return step


def _if_active(on, mode, take, stay):
    """What `take()` gives, its metrics last, or else what `stay(its shapes)` gives, with metrics of
    zeros."""

    def taken():
        *new, metrics = take()
        return vary((*new, {**metrics, "active": jnp.ones(())}))

    def stayed():
        shapes = jax.eval_shape(taken)
        return vary((*stay(shapes), _zeros(shapes[-1])))

    if on is True:
        return taken()
    if block_size(mode) != 1:  # under vmap a cond runs both branches anyway
        return jax.tree.map(lambda a, b: jnp.where(on, a, b), taken(), stayed())
    return lax.cond(on, taken, stayed)


def _averaged_step(one, state, memory, batch, context, mode, mixer, compressor):
    """All gradients, their average, all updates: the collective stays outside of any cond."""

    def masked(params, model_state, batch, worker, rate):
        take = lambda: one.gradient(params, model_state, batch, worker)
        stay = lambda shapes: (_zeros(shapes[0]), model_state)
        return _if_active(one.active(worker, rate), mode, take, stay)

    def step(params, opt_state, grads, loss):
        updates, opt_state = one.update(grads, opt_state, params, loss)
        return optax.apply_updates(params, updates), opt_state

    grads, model_state, metrics = over_workers(masked, mode)(
        state.params, state.model_state, batch, context.worker, context.rate
    )
    loss = metrics.get("loss")
    if compressor is None:
        grads, loss = spread(mixer.average((grads, loss), context), (grads, loss))
    else:
        key = stream(state.key, STEP_MESSAGE, state.step)
        synced = partial_sync(mixer, compressor, grads, memory.stacked, key, context)
        nothing = jax.tree.map(lambda x: jnp.zeros_like(x[:1, :1]), grads)
        grads, memory = spread(synced.add(nothing), grads), Memory(stacked=synced.memory)
        loss = spread(mixer.average(loss, context), loss)
    params, opt_state = over_workers(step, mode, kept=2)(state.params, state.opt_state, grads, loss)
    return _advance(state, memory, params, opt_state, model_state, metrics)


def _exchanged_step(one, state, memory, batch, context, mode, mixer, compressor):
    """All updates, their partial synchronisation.

    A worker applies what it does not say at once, so that a loop over workers keeps one update
    alive; a compressor of two messages has to wait for the answer to the first.
    """
    key = stream(state.key, STEP_MESSAGE, state.step)
    update = _stepped(one, mode, lambda params, updates: updates, _zeros)
    places = (state.params, state.opt_state, state.model_state, batch, context.worker, context.rate)

    def speaking(params, opt_state, model_state, batch, worker, rate, kept):
        updates, *new, metrics = update(params, opt_state, model_state, batch, worker, rate)
        payload, residual = compress(compressor, updates, kept, key, worker)
        return optax.apply_updates(params, residual), *new, payload, metrics

    if compressor.second is None:
        step = over_workers(speaking, mode, kept=3)
        params, opt_state, model_state, payload, metrics = step(*places, memory.stacked)
        add = aggregate(mixer, compressor, payload, state.params, key, context)
    else:
        updates, opt_state, model_state, metrics = over_workers(update, mode)(*places)
        synced = partial_sync(mixer, compressor, updates, memory.stacked, key, context)
        params = optax.apply_updates(state.params, synced.residual)
        add, memory = synced.add, Memory(stacked=synced.memory)
    if jax.tree.leaves(state.anchor):
        state = state._replace(anchor=add_single(add, state.anchor))
    return _advance(state, memory, add(params), opt_state, model_state, metrics)


def _zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _advance(state, memory, params, opt_state, model_state, metrics):
    step = state.step + 1
    state = state._replace(params=params, opt_state=opt_state, model_state=model_state, step=step)
    return state, memory, Info(worker={name: value[None] for name, value in metrics.items()})
