"""A step of CSER: the updates of the workers' optimizers are partially synchronised."""

import jax
import optax

from jaxlocal.parallel.collectives import vary
from jaxlocal.parallel.keys import STEP_MESSAGE, stream_key
from jaxlocal.parallel.worker_maps import over_workers
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.partial_sync import (
    add_single,
    aggregate,
    carried,
    check_common,
    compress,
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
from jaxlocal.types import Compressor, Memory, Mixer, Stage


def synced_updates(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    mixer: Mixer,
    compressor: Compressor | str,
    *,
    worker_map: str | None = None,
) -> Stage:
    """Synchronise the compressed part of the workers' updates; each worker applies its own rest.

        x_i ← x_i + Σ_j a_j C(u_j) + u_i − C(u_i);  an anchor moves by Σ_j a_j C(u_j)

    u_i is the update of worker i's own optimizer. A worker that skips the step by its rate sends an
    update of zero, keeps its optimizer state, and applies the average of the others.

    Args:
      grad_fn, optimizer, worker_map: as in `local_step`.
      mixer: one that makes all workers common, such as `mixing.mean()`.
      compressor: C, C2 in CSER.

    Returns:
      A stage of one step. It reports what `local_step` reports.

    Raises:
      ConfigurationError: the mixer leaves workers different or cannot carry the payload, or the
        worker map is unknown.

    Source: Xie et al., "CSER: Communication-efficient SGD with Error Reset", NeurIPS 2020,
    https://arxiv.org/abs/2007.13221, Algorithms 2 and 4.

    >>> import jaxlocal
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> blocks = jaxlocal.compression.grbs(64)
    >>> synced_updates(grad_fn, optax.sgd(0.1), jaxlocal.mixing.mean(), blocks).steps
    1
    """
    check_worker(grad_fn, worker_map)
    compressor = carried(mixer, compressor)
    check_common("a partial synchronisation of updates", mixer)
    update_fn = update_of(optimizer)
    init = lambda state: Memory(stacked=compressor_memory(compressor, state.params))

    def apply(state, memory, batches, context):
        batch = jax.tree.map(lambda b: b[0], batches)
        mode = choose_worker_map(worker_map, grad_fn, state, batch, context)
        take = _update(grad_fn, update_fn, state, context)
        update = at_rate(take, _stay, state, context, mode)
        own = (state.params, state.opt_state, state.model_state, batch)
        workers = (*own, context.worker, context.rate)
        exchange = _in_one_message if compressor.second is None else _in_two_messages
        add, *new, metrics, memory = exchange(
            update, mode, workers, mixer, compressor, memory, state, context
        )
        if jax.tree.leaves(state.anchor):
            state = state._replace(anchor=add_single(add, state.anchor))
        params, opt_state, model_state = new
        return advance(state, memory, add(params), opt_state, model_state, metrics)

    communication = lambda state, number=0: partial_sync_messages(mixer, compressor, state.params)
    return Stage(init, apply, 1, communication, alike=())


def _update(grad_fn, update_fn, state, context):
    """The update of one worker's optimizer."""

    def take(params, opt_state, model_state, batch, worker, rate):
        inputs = inputs_of(state, context, model_state, batch, worker)
        at = evaluation(grad_fn, state, params, inputs, grad_fn(params, *inputs))
        updates, opt_state = update_fn(at.grads, opt_state, params, **at.extra)
        return vary((updates, opt_state, at.model_state, reported(at.metrics)))

    return take


def _stay(shapes, params, opt_state, model_state, *_):
    return zeros(shapes[0]), opt_state, model_state


def _in_one_message(update, mode, workers, mixer, compressor, memory, state, context):
    """A worker applies its residual at once, so that a loop over workers keeps one update alive."""
    key = stream_key(state.key, STEP_MESSAGE, state.step)

    def step(params, opt_state, model_state, batch, worker, rate, kept):
        updates, *new, metrics = update(params, opt_state, model_state, batch, worker, rate)
        payload, residual = compress(compressor, updates, kept, key, worker)
        return apply_updates(params, residual), *new, payload, metrics

    *new, payload, metrics = over_workers(step, mode, in_place=3)(*workers, memory.stacked)
    add = aggregate(mixer, compressor, payload, state.params, key, context)
    return add, *new, metrics, memory


def _in_two_messages(update, mode, workers, mixer, compressor, memory, state, context):
    """The residual is computed after the first message has been averaged."""
    key = stream_key(state.key, STEP_MESSAGE, state.step)
    updates, *new, metrics = over_workers(update, mode)(*workers)
    synced = partial_sync(mixer, compressor, updates, memory.stacked, key, context)
    params = apply_updates(state.params, synced.residual)
    return synced.add, params, *new, metrics, Memory(stacked=synced.memory)
