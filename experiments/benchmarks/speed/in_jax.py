"""The contenders that JAX runs: jaxlocal's workers, those of a user's own `vmap`, and one model
that all of them share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxlocal
from experiments.benchmarks.benchmarking import peak_bytes
from experiments.benchmarks.speed.plain_models import plain_model
from experiments.benchmarks.speed.workloads import (
    LEARNING_RATE,
    Workload,
    example_shapes,
    make_pool,
    model_of,
    scaled,
)
from jaxlocal import Layout, RoundFn
from jaxlocal.models.supervised import training_loss
from jaxlocal.parallel.mesh import make_mesh
from jaxlocal.stages.gradient import GradFn
from jaxlocal.types import Method, Tree

# Runs a round of examples [steps, workers, batch] to its end; gives the losses, leading with steps.
Run = Callable[[np.ndarray], Any]


def workers(workload: Workload, params: Tree, worker_map: str | None = None) -> Run:
    """Local SGD by the library, on as many devices as the workers divide over."""
    return _rounds(workload, local_sgd(workload, worker_map), workload.workers, params)


def shared(workload: Workload, params: Tree) -> Run:
    """One model, with the examples of all workers in one batch: no simulation does less. Over
    several devices it is data parallel."""
    total = workload.workers * workload.batch_size
    counts = range(1, len(jax.devices()) + 1)
    method = jaxlocal.data_parallel(gradient_of(workload), optax.sgd(LEARNING_RATE))
    return _rounds(workload, method, max(n for n in counts if total % n == 0), params)


def program_bytes(workload: Workload, worker_map: str | None = None) -> int:
    """The most that one device holds while it runs the steps of a round for all workers, as the
    compiler states it; the round's examples count."""
    layout, steps = Layout(workers_per_hub=workload.workers), workload.steps
    mesh = make_mesh(layout, jax.devices()[:1])
    round_fn = RoundFn(local_sgd(workload, worker_map), layout, mesh)
    grid = (steps, *layout.shape, workload.batch_size)
    batches = example_shapes(workload, grid)
    state = round_fn.shapes(*jax.eval_shape(model_of(workload).init, jax.random.key(0)))
    return peak_bytes(round_fn.local_steps, state, batches, donate=(0,))


def local_sgd(workload: Workload, worker_map: str | None = None) -> Method:
    """The library's method; without a worker map, by the library's own choice of one."""
    options = {"worker_map": worker_map} if worker_map else {}
    optimizer = optax.sgd(LEARNING_RATE)
    return jaxlocal.local_sgd(gradient_of(workload), optimizer, workload.steps, **options)


def gradient_of(workload: Workload) -> GradFn:
    """Of the library's model."""
    loss = training_loss(model_of(workload), scaled, workload.classes)
    return jaxlocal.gradients(loss, stateful=True)


def _rounds(workload: Workload, method: Method, count: int, params: Tree) -> Run:
    """The library's rounds of a method with so many workers."""
    round_fn = RoundFn(method, Layout(workers_per_hub=count), data=make_pool(workload))
    held = [round_fn.init(params, jax.random.key(0))]

    def run(indices: np.ndarray) -> Any:
        held[0], info = round_fn(held[0], indices.reshape(len(indices), 1, count, -1))
        jax.block_until_ready(held[0])
        return info.worker["loss"]

    return run


def plain_vmap(workload: Workload, params: Tree) -> Run:
    """What a user of JAX writes first: plain layers, mapped over the workers, in a scan."""
    pool = jax.device_put(make_pool(workload))
    stack = lambda tree: jax.tree.map(
        lambda x: jnp.broadcast_to(x, (workload.workers, *x.shape)), tree
    )
    gradient = jax.vmap(jax.value_and_grad(plain_loss(workload)), in_axes=(0, None, 0))

    @partial(jax.jit, donate_argnums=0)
    def round_of(params, pool, indices):
        def step(params, index):
            losses, grads = gradient(params, pool, index)
            return jax.tree.map(lambda x, g: x - LEARNING_RATE * g, params, grads), losses

        params, losses = lax.scan(step, params, indices)
        return stack(jax.tree.map(lambda x: x.mean(0), params)), losses

    held = [jax.jit(stack)(params)]

    def run(indices: np.ndarray) -> Any:
        held[0], losses = round_of(held[0], pool, indices)
        jax.block_until_ready(held[0])
        return losses

    return run


def plain_loss(workload: Workload) -> Callable[[Tree, Tree, Any], jax.Array]:
    """`loss(params, pool, index)` of one worker's batch, of plain layers."""
    model = plain_model(workload)

    def loss(params: Tree, pool: Tree, index: Any) -> jax.Array:
        inputs, targets = pool["inputs"][index], pool["targets"][index]
        logits, _ = model.apply(params, {}, scaled(inputs), None, True)
        if workload.outputs == 1:
            return optax.sigmoid_binary_cross_entropy(logits[:, 0], targets).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return loss
