"""Rounds of DrJAX: workers are placed on a mesh, mapped by it, and reduced to their mean."""

from typing import Any

import drjax
import jax
import numpy as np
import optax
from jax import P, lax

from experiments.benchmarks.peers.plain_layers import plain_loss
from experiments.benchmarks.speed.jax_contenders import Rounds
from experiments.benchmarks.workloads import ADAMW_RATE, LEARNING_RATE, Workload, make_pool
from jaxlocal.types import Tree


def drjax_rounds(workload: Workload, params: Tree) -> Rounds:
    """Run rounds of DrJAX on all devices, with layers by hand."""
    mesh = jax.make_mesh((jax.device_count(),), ("workers",), (jax.sharding.AxisType.Auto,))
    loss, averages = plain_loss(workload), workload.method == "local_sgd"
    inner = optax.sgd(LEARNING_RATE) if averages else optax.adamw(ADAMW_RATE)
    outer = optax.sgd(1.0) if averages else optax.sgd(0.7, momentum=0.9, nesterov=True)
    place = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))
    pool = place(make_pool(workload), P())

    def local_steps(pool, params, state, indices):
        def step(carry, index):
            params, state = carry
            batch = jax.tree.map(lambda x: x[index], pool)
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = inner.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (trained, state), losses = lax.scan(step, (params, state), indices)
        return jax.tree.map(lambda x, y: x - y, params, trained), state, losses

    @drjax.program(placements={"workers": workload.workers})
    def train(model, own, shared, pool, indices):
        start = drjax.broadcast(model, mesh=mesh)
        work = lambda *worker: local_steps(pool, *worker)
        moved, own, losses = drjax.map_fn(work, (start, own, indices), mesh=mesh)
        updates, shared = outer.update(drjax.reduce_mean(moved), shared, model)
        return optax.apply_updates(model, updates), own, shared, losses

    train = jax.jit(train, donate_argnums=(0, 1, 2))
    stack = lambda x: np.broadcast_to(x, (workload.workers, *np.shape(x)))
    own = place(jax.tree.map(stack, inner.init(params)), P("workers"))
    model, shared = place((params, outer.init(params)), P())

    def run(indices: np.ndarray) -> Any:
        nonlocal model, own, shared
        by_worker = place(indices.swapaxes(0, 1), P("workers"))
        model, own, shared, losses = train(model, own, shared, pool, by_worker)
        jax.block_until_ready(model)
        return losses.T

    return Rounds(run, lambda: jax.device_get(model))
