"""The contenders that run on JAX: workers of jaxlocal, workers of a user's own `vmap`, and one
model that all workers share."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxlocal
from experiments.benchmarks.memory import peak_bytes
from experiments.benchmarks.speed.flax_models import flax_model
from experiments.benchmarks.workloads import (
    ADAMW_RATE,
    LEARNING_RATE,
    Workload,
    example_shapes,
    gradient_of,
    make_pool,
    model_of,
    scaled,
)
from jaxlocal import Layout, RoundFn
from jaxlocal.parallel.mesh import make_mesh
from jaxlocal.types import Method, Tree


class Rounds(NamedTuple):
    """The rounds of a contender, which are run one after another."""

    # Runs a round on the examples of indices [steps, workers, batch], waits until it is done, and
    # returns the losses, whose first axis is the steps, or None where it does not know them.
    run: Callable[[np.ndarray], Any]
    params: Callable[[], Tree] | None = None  # the average model, with the names of jaxlocal's


def library_rounds(workload: Workload, params: Tree, worker_map: str | None = None) -> Rounds:
    """Run rounds of jaxlocal's method, on as many devices as the workers divide over."""
    return _rounds(workload, method_of(workload, worker_map), workload.workers, params)


def shared_model_rounds(workload: Workload, params: Tree) -> Rounds:
    """Train one model on the examples of all workers in one batch; no simulation does less.

    On several devices this is data parallelism.
    """
    total = workload.workers * workload.batch_size
    counts = range(1, len(jax.devices()) + 1)
    method = jaxlocal.data_parallel(gradient_of(workload), optax.sgd(LEARNING_RATE))
    return _rounds(workload, method, max(n for n in counts if total % n == 0), params)


def program_bytes(workload: Workload, worker_map: str | None = None) -> int:
    """Peak memory of a round of all workers on one device, without its examples, as the compiler
    states it."""
    layout, steps = Layout(workers_per_hub=workload.workers), workload.steps
    mesh = make_mesh(layout, jax.devices()[:1])
    round_fn = RoundFn(method_of(workload, worker_map), layout, mesh)
    grid = (steps, *layout.shape, workload.batch_size)
    batches = example_shapes(workload, grid)
    state = round_fn.shapes(*jax.eval_shape(model_of(workload).init, jax.random.key(0)))
    examples = sum(x.size * x.dtype.itemsize for x in batches.values())
    return peak_bytes(round_fn, state, batches, donate=(0,)) - examples


def method_of(workload: Workload, worker_map: str | None = None) -> Method:
    """Build jaxlocal's method for a workload; by default the library chooses the worker map."""
    make, optimizer = {
        "local_sgd": (jaxlocal.local_sgd, optax.sgd(LEARNING_RATE)),
        "diloco": (jaxlocal.diloco, optax.adamw(ADAMW_RATE)),
    }[workload.method]
    gradient = gradient_of(workload)
    return make(gradient, optimizer, period=workload.steps, worker_map=worker_map)


def _rounds(workload: Workload, method: Method, workers: int, params: Tree) -> Rounds:
    """Run rounds of a method of the library."""
    round_fn = RoundFn(method, Layout(workers_per_hub=workers), data=make_pool(workload))
    state = round_fn.init(params, jax.random.key(0))

    def run(indices: np.ndarray) -> Any:
        nonlocal state
        state, info = round_fn(state, indices.reshape(len(indices), 1, workers, -1))
        jax.block_until_ready(state)
        return info.worker["loss"]

    return Rounds(run, lambda: jax.device_get(round_fn.mean(state)[0]))


def vmap_rounds(workload: Workload, params: Tree) -> Rounds:
    """Run what a user of JAX writes first: plain layers, `vmap` over the workers, in a scan."""
    pool = jax.device_put(make_pool(workload))
    stack = lambda tree: jax.tree.map(
        lambda x: jnp.broadcast_to(x, (workload.workers, *x.shape)), tree
    )
    gradient = jax.vmap(jax.value_and_grad(plain_loss(workload)), in_axes=(0, None, 0))

    @partial(jax.jit, donate_argnums=0)
    def train_round(params, pool, indices):
        def step(params, index):
            losses, grads = gradient(params, pool, index)
            return jax.tree.map(lambda x, g: x - LEARNING_RATE * g, params, grads), losses

        params, losses = lax.scan(step, params, indices)
        return stack(jax.tree.map(lambda x: x.mean(0), params)), losses

    stacked = jax.jit(stack)(params)

    def run(indices: np.ndarray) -> Any:
        nonlocal stacked
        stacked, losses = train_round(stacked, pool, indices)
        jax.block_until_ready(stacked)
        return losses

    return Rounds(run)


def plain_loss(workload: Workload) -> Callable[[Tree, Tree, Any], jax.Array]:
    """Make `loss(params, pool, index)`, the loss of one worker's batch with plain layers."""
    model = flax_model(workload)

    def loss(params: Tree, pool: Tree, index: Any) -> jax.Array:
        inputs, targets = pool["inputs"][index], pool["targets"][index]
        logits, _ = model.apply(params, {}, scaled(inputs), None, True)
        if workload.outputs == 1:
            return optax.sigmoid_binary_cross_entropy(logits[:, 0], targets).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return loss
