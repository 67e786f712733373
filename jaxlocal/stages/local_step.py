"""The local step: a gradient and an optimizer step of every worker, without communication."""

import jax
import optax

from jaxlocal.parallel.collectives import vary
from jaxlocal.parallel.worker_maps import over_workers
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.updates import apply_updates, update_of
from jaxlocal.stages.worker_step import (
    advance,
    at_rate,
    check_worker,
    choose_worker_map,
    evaluation,
    inputs_of,
    reported,
)
from jaxlocal.types import Stage


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

    def apply(state, memory, batches, context):
        def take(params, opt_state, model_state, batch, worker, rate):
            inputs = inputs_of(state, context, model_state, batch, worker)
            at = evaluation(grad_fn, state, params, inputs, grad_fn(params, *inputs))
            updates, opt_state = update(at.grads, opt_state, params, **at.extra)
            params = apply_updates(params, updates)
            return vary((params, opt_state, at.model_state, reported(at.metrics)))

        stay = lambda shapes, params, opt_state, model_state, *_: (params, opt_state, model_state)
        batch = jax.tree.map(lambda b: b[0], batches)
        mode = choose_worker_map(worker_map, grad_fn, state, batch, context)
        step = at_rate(take, stay, state, context, mode)
        workers = (state.params, state.opt_state, state.model_state, batch)
        results = over_workers(step, mode, in_place=3)(*workers, context.worker, context.rate)
        return advance(state, memory, *results)

    return Stage(lambda state: (), apply, 1, lambda state, number=0: [], alike=())
