"""A step of data parallelism: gradients are averaged before the optimizer."""

import warnings

import jax
import jax.numpy as jnp
import optax

from jaxlocal.parallel.collectives import broadcast_to_workers, vary, worker_shapes
from jaxlocal.parallel.keys import STEP_MESSAGE, stream_key
from jaxlocal.parallel.worker_maps import over_workers
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.partial_sync import (
    carried,
    check_mixer,
    compressor_memory,
    partial_sync,
    partial_sync_messages,
)
from jaxlocal.stages.updates import apply_updates, update_of
from jaxlocal.stages.worker_step import (
    advance,
    at_rate,
    check_worker,
    choose_worker_map,
    evaluation,
    inputs_of,
    reported,
    zeros,
)
from jaxlocal.types import Compressor, Memory, Message, Mixer, Stage


def averaged_gradients(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    mixer: Mixer,
    *,
    compressor: Compressor | str | None = None,
    worker_map: str | None = None,
) -> Stage:
    """Average the gradients of all workers, and take the same optimizer step on each.

        g ← Σ_j W_ji C(g_j);  x_i ← optimizer_i(x_i, g)

    A worker that skips the step by its rate contributes a gradient of zero, and takes the step with
    the average.

    Args:
      grad_fn, optimizer, worker_map: as in `local_step`, but the optimizer draws the same noise on
        all workers, and is not given the functions `value_fn` and `grad_fn`: a line search would
        communicate.
      mixer: W, usually `mixing.mean()`.
      compressor: C, without error feedback; by default gradients are sent uncompressed. What a
        biased compressor leaves out of them is lost, which warns.

    Returns:
      A stage of one step. It reports what `local_step` reports.

    Raises:
      ConfigurationError: the mixer cannot carry the payload of the compressor, or the worker map is
        unknown.

    >>> import jaxlocal
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> averaged_gradients(grad_fn, optax.sgd(0.1), jaxlocal.mixing.mean()).steps
    1
    """
    check_worker(grad_fn, worker_map)
    check_mixer(mixer)
    if compressor is not None:
        compressor = carried(mixer, compressor)
        _warn_of_bias(compressor)
    update = update_of(optimizer)

    def init(state):
        if compressor is None:
            return ()
        return Memory(stacked=compressor_memory(compressor, state.params))

    def apply(state, memory, batches, context):
        # Gradients, their average, updates: three passes, since no collective may be in a cond.
        batch = jax.tree.map(lambda b: b[0], batches)
        mode = choose_worker_map(worker_map, grad_fn, state, batch, context)
        gradient = at_rate(_gradient(grad_fn, state, context), _stay, state, context, mode)
        workers = (state.params, state.model_state, batch, context.worker, context.rate)
        grads, model_state, metrics = over_workers(gradient, mode)(*workers)
        (grads, loss), memory = _average(
            mixer, compressor, grads, metrics.get("loss"), memory, state, context
        )
        params, opt_state = over_workers(_step(update, state), mode, in_place=2)(
            state.params, state.opt_state, grads, loss
        )
        return advance(state, memory, params, opt_state, model_state, metrics)

    def communication(state, number=0):
        if compressor is None:
            return [Message(mixer, worker_shapes(state.params))]
        return partial_sync_messages(mixer, compressor, state.params)

    return Stage(init, apply, 1, communication, alike=mixer.axes)


def _gradient(grad_fn, state, context):
    """The gradient of one worker."""

    def gradient(params, model_state, batch, worker, rate):
        inputs = inputs_of(state, context, model_state, batch, worker)
        at = evaluation(grad_fn, state, params, inputs, grad_fn(params, *inputs))
        return vary((at.grads, at.model_state, reported(at.metrics)))

    return gradient


def _stay(shapes, params, model_state, *_):
    return zeros(shapes[0]), model_state


def _average(mixer, compressor, grads, loss, memory, state, context):
    """The average gradient and loss, on every worker, and the memory of the compressor."""
    if compressor is None:
        means = mixer.average((grads, loss), context)
        return broadcast_to_workers(means, (grads, loss)), memory
    key = stream_key(state.key, STEP_MESSAGE, state.step)
    synced = partial_sync(mixer, compressor, grads, memory.stacked, key, context)
    nothing = jax.tree.map(lambda x: jnp.zeros_like(x[:1, :1]), grads)
    grads = broadcast_to_workers(synced.add(nothing), grads)
    loss = broadcast_to_workers(mixer.average(loss, context), loss)
    return (grads, loss), Memory(stacked=synced.memory)


def _step(update, state):
    """The optimizer step of one worker on the average gradient."""

    def step(params, opt_state, grads, loss):
        known = {"step": state.step, "grad": grads} | ({} if loss is None else {"value": loss})
        updates, opt_state = update(grads, opt_state, params, **known)
        return apply_updates(params, updates), opt_state

    return step


def _warn_of_bias(compressor: Compressor) -> None:
    if not compressor.unbiased:
        warnings.warn(
            f"{compressor.name} is biased, and without error feedback what it leaves out of the "
            f"gradients is lost: such a run may stall or diverge where ef_sgd and cser converge",
            stacklevel=5,
        )
