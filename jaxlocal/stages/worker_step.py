"""What the stages of one step share: which workers take the step, and what they report."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.collectives import vary
from jaxlocal.parallel.keys import GRADIENT, RATE, stream_key
from jaxlocal.parallel.leaves import check_same
from jaxlocal.parallel.pool import fetch
from jaxlocal.parallel.worker_maps import block_size, worker_map_for
from jaxlocal.stages.gradient import GradFn, check_metrics, takes
from jaxlocal.types import Context, Info, TrainState, Tree


def at_rate(step: Callable, stay: Callable, state: TrainState, context: Context, mode: str):
    """The step of one worker, which it takes with probability p_i; otherwise it stays as it is.

    Args:
      step: `step(*trees, worker, rate)` → (..., metrics), of one worker.
      stay: `stay(shapes, *trees, worker, rate)` → the same without metrics; `shapes` are those of
        what `step` gives.
      mode: the worker map that runs it.
    """
    if context.rate is None:
        return step

    def either(*trees):
        *_, worker, rate = trees
        key = stream_key(state.key, RATE, state.step, worker)
        active = jax.random.uniform(key, dtype=rate.dtype) < rate
        shapes = jax.eval_shape(step, *trees)
        stayed = lambda *trees: vary((*stay(shapes, *trees), zeros(shapes[-1])))
        if block_size(mode) == 1:
            return lax.cond(active, step, stayed, *trees)
        # Under vmap a cond runs both branches anyway.
        return jax.tree.map(lambda a, b: jnp.where(active, a, b), step(*trees), stayed(*trees))

    return either


class Evaluation(NamedTuple):
    """The gradient of one worker at one step."""

    grads: Tree
    model_state: Tree
    metrics: dict[str, Any]
    extra: dict[str, Any]  # what the worker's optimizer may be given besides


def inputs_of(
    state: TrainState, context: Context, model_state: Tree, batch: Tree, worker: jax.Array
) -> tuple[Tree, Tree, jax.Array]:
    """What `grad_fn` takes after the parameters: model state, examples and key of one worker."""
    key = stream_key(state.key, GRADIENT, state.step, worker)
    return model_state, fetch(context.data, batch), key


def evaluation(
    grad_fn: GradFn, state: TrainState, params: Tree, inputs: tuple[Any, ...], returned: Any
) -> Evaluation:
    """The gradient of one worker at this step, from what `grad_fn(params, *inputs)` returned.

    A stage calls `grad_fn` itself, so that few frames lie between a round and the loss.

    Raises:
      ConfigurationError: gradients that are not like the parameters, a model state that is not like
        the one before, or metrics that are not scalars.
    """
    if not isinstance(returned, tuple | list) or len(returned) != 3:
        raise ConfigurationError(
            f"grad_fn must return (gradients, model_state, metrics), got {type(returned).__name__}"
        )
    grads, after, metrics = returned
    check_same("the gradients", "the parameters", params, grads, precision=False)
    check_same("the model state after a step", "the one before", inputs[0], after)
    check_metrics(metrics)

    at = lambda params: grad_fn(params, *inputs)

    def value_fn(params, step=None, grad_fn=None, obj_fn=None):
        """The loss. A line search of optax passes on what it does not take itself."""
        return at(params)[2]["loss"]

    extra = {"step": state.step, "grad": grads, "grad_fn": lambda params, number=0: at(params)[0]}
    if "loss" in metrics:
        extra |= {"value": metrics["loss"], "value_fn": value_fn, "obj_fn": value_fn}
    return Evaluation(grads, after, metrics, extra)


def reported(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a worker that takes its step."""
    return {**metrics, "active": jnp.ones(())}


def choose_worker_map(
    chosen: str | None, grad_fn: GradFn, state: TrainState, batch: Tree, context: Context
) -> str:
    """The worker map that the user has chosen, or the fastest one for the gradient."""
    if chosen is not None:
        return chosen
    gradient = lambda params, model_state, batch: grad_fn(
        params, model_state, fetch(context.data, batch), state.key
    )
    one = jax.tree.map(lambda x: x[0, 0], (state.params, state.model_state, batch))
    return worker_map_for(gradient, *one)


def check_worker(grad_fn: GradFn, worker_map: str | None) -> None:
    """Raise ConfigurationError where these are not what a worker runs."""
    if not takes(grad_fn, 4):
        raise ConfigurationError(
            f"grad_fn must take (params, model_state, batch, key), as jaxlocal.gradients(loss) "
            f"makes it, got {grad_fn!r}"
        )
    if worker_map is not None:
        block_size(worker_map)


def advance(
    state: TrainState,
    memory: Tree,
    params: Tree,
    opt_state: Tree,
    model_state: Tree,
    metrics: dict[str, Any],
) -> tuple[TrainState, Tree, Info]:
    """The state after one step, and the report of it."""
    by_step = {name: value[None] for name, value in metrics.items()}
    return advance_by(1, state, memory, params, opt_state, model_state, by_step)


def advance_by(
    steps: int,
    state: TrainState,
    memory: Tree,
    params: Tree,
    opt_state: Tree,
    model_state: Tree,
    metrics: dict[str, Any],
) -> tuple[TrainState, Tree, Info]:
    """The state after some steps, and the report of them from metrics [steps, d, n]."""
    state = state._replace(
        params=params, opt_state=opt_state, model_state=model_state, step=state.step + steps
    )
    return state, memory, Info(worker=metrics)


def zeros(tree: Tree) -> Tree:
    """Zeros of the shapes and types of a tree."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
