"""The steps of one worker in plain JAX, and the optimizers of a workload."""

from collections.abc import Callable

import jax
import numpy as np
import optax
from jax import P, lax

from experiments.benchmarks.workloads import ADAMW_RATE, LEARNING_RATE, Workload
from jaxlocal.types import Tree

Loss = Callable[[Tree, Tree], jax.Array]  # loss(params, batch)


def optimizers(workload: Workload) -> tuple[optax.GradientTransformation, ...]:
    """Make the optimizer of the workers and the one that steps on how far they move on average."""
    if workload.method == "local_sgd":
        return optax.sgd(LEARNING_RATE), optax.sgd(1.0)
    return optax.adamw(ADAMW_RATE), optax.sgd(0.7, momentum=0.9, nesterov=True)


def first_states(workload: Workload, params: Tree, place: Callable) -> tuple[Tree, Tree, Tree]:
    """Place the first model, the workers' optimizer states, and that of the outer optimizer.

    Args:
      workload: whose optimizers.
      params: that all workers start from, arrays on the host.
      place: `place(tree, spec)` puts a tree on the devices; worker states have the axis "workers".
    """
    inner, outer = optimizers(workload)
    stack = lambda x: np.broadcast_to(x, (workload.workers, *np.shape(x)))
    own = jax.tree.map(stack, inner.init(params))
    return place(params, P()), place(own, P("workers")), place(outer.init(params), P())


def make_steps(loss: Loss, optimizer: optax.GradientTransformation) -> Callable:
    """Make `steps(pool, params, state, indices)`, which gives (params, state, losses).

    It takes a step of one worker for each row of the indices [steps, batch] in the pool.
    """

    def steps(pool: Tree, params: Tree, state: Tree, indices: jax.Array) -> tuple:
        def step(carry, index):
            params, state = carry
            batch = jax.tree.map(lambda x: x[index], pool)
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, state), losses = lax.scan(step, (params, state), indices)
        return params, state, losses

    return steps
