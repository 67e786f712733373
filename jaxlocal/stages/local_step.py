"""The local step: a gradient and an optimizer step of every worker, without communication."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxlocal.parallel.collectives import vary
from jaxlocal.parallel.worker_maps import block_size, over_workers
from jaxlocal.stages.averaged_workers import averaged_rows, averaged_workers, with_rows
from jaxlocal.stages.compose import AnySteps
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.updates import apply_updates, update_of
from jaxlocal.stages.worker_step import (
    advance_by,
    at_rate,
    check_worker,
    choose_worker_map,
    evaluation,
    inputs_of,
    reported,
)
from jaxlocal.types import Stage, Tree


def local_step(
    grad_fn: GradFn, optimizer: optax.GradientTransformation, *, worker_map: str | None = None
) -> Stage:
    """Take one local step on every worker, without communication.

        with probability p_i:  x_i ← optimizer_i(x_i, g_i);  otherwise x_i stays

    Gradient and update are one pass over the workers of a device, so that a loop over them keeps
    one gradient alive.

    Args:
      grad_fn: as `gradients` makes it. Batches of indices are looked up in the pool before it is
        called.
      optimizer: any optax transformation. It is mapped over workers, so that a norm is that of one
        worker. Its update is given, where it takes them, `step`, the step of the run, the loss and
        the gradient as `value` and `grad`, and both as functions of the parameters, on the same
        batch, as `value_fn` (`obj_fn`) and `grad_fn`. Random keys in its state differ by worker.
      worker_map: "vmap", "map" or "blocks:N"; by default the fastest for grad_fn on this backend.

    Returns:
      A stage of one step. It reports for every worker "active" (1 where it took the step) and the
      metrics of grad_fn (0 where it did not).

    Raises:
      ConfigurationError: an unknown worker map.

    >>> import jaxlocal, jax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> local_step(grad_fn, optax.sgd(0.1)).steps
    1
    """
    check_worker(grad_fn, worker_map)
    update = update_of(optimizer)

    @partial(jax.jit, inline=True)  # one trace for rounds of all lengths
    def take(state, context, params, opt_state, model_state, batch, worker, rate):
        inputs = inputs_of(state, context, model_state, batch, worker)
        at = evaluation(grad_fn, state, params, inputs, grad_fn(params, *inputs))
        updates, opt_state = update(at.grads, opt_state, params, **at.extra)
        params = apply_updates(params, updates)
        return vary((params, opt_state, at.model_state, reported(at.metrics)))

    def at_numbers(state, batches, context):
        first = jax.tree.map(lambda b: b[0], batches)
        mode = choose_worker_map(worker_map, grad_fn, state, first, context)
        common = state._replace(params=(), opt_state=(), model_state=(), memory=(), anchor=())

        def at(number):
            now = common._replace(step=state.step + number)
            return at_rate(partial(take, now, context), _stay, now, context, mode)

        return at, mode

    def apply(state, memory, batches, context, steps):
        at, mode = at_numbers(state, batches, context)
        workers = (state.params, state.opt_state, state.model_state)
        numbers, who = jnp.arange(steps, dtype=state.step.dtype), (context.worker, context.rate)
        if block_size(mode) == 1:
            d, n = context.worker.shape
            places = jnp.arange(d * n).reshape(d, n)
            all_steps = over_workers(_all_steps(at, numbers, batches), mode, in_place=3)
            *workers, metrics = all_steps(*workers, places, *who)
            metrics = {name: jnp.moveaxis(value, 2, 0) for name, value in metrics.items()}
        else:
            workers, metrics = lax.scan(_one_step(at, mode, who), workers, (numbers, batches))
        return advance_by(steps, state, memory, *workers, metrics)

    def averaged(state, batches, context, steps, leaves):
        at, mode = at_numbers(state, batches, context)
        if block_size(mode) == 1:
            numbers = jnp.arange(steps, dtype=state.step.dtype)
            all_steps = _all_steps(at, numbers, batches)
            return averaged_workers(all_steps, state, context, steps, leaves)
        after, _, info = apply(with_rows(state, context), (), batches, context, steps)
        return averaged_rows(after, context, leaves, info)

    take_steps = AnySteps(apply, averaged)
    return Stage(lambda state: (), take_steps, 1, lambda state, number=0: [], alike=())


def _stay(shapes: Tree, params: Tree, opt_state: Tree, model_state: Tree, *_: Tree) -> tuple:
    return params, opt_state, model_state


def _all_steps(at: Callable[[jax.Array], Callable], numbers: jax.Array, batches: Tree) -> Callable:
    """All steps of the worker at a place: with the workers in the outer loop, one model is in the
    cache.

    Batches are read where they are, without a copy of all.
    """
    flat = jax.tree.map(
        lambda b: b.reshape((len(b), b.shape[1] * b.shape[2]) + b.shape[3:]), batches
    )

    def steps(params, opt_state, model_state, place, worker, rate):
        read = lambda b: lax.dynamic_index_in_dim(b, place, 1, keepdims=False)

        def body(carry, step):
            number, batch = step
            *carry, metrics = at(number)(*carry, batch, worker, rate)
            return tuple(carry), metrics

        own = (numbers, jax.tree.map(read, flat))
        carry, metrics = lax.scan(body, (params, opt_state, model_state), own)
        return (*carry, metrics)

    return steps


def _one_step(at: Callable[[jax.Array], Callable], mode: str, who: tuple) -> Callable:
    """One step of all workers, as the body of a scan."""

    def body(carry, step):
        number, batch = step
        *carry, metrics = over_workers(at(number), mode, in_place=3)(*carry, batch, *who)
        return tuple(carry), metrics

    return body
