"""Rounds of DrJAX: workers are placed on a mesh, mapped by it, and reduced to their mean."""

from collections.abc import Callable
from typing import Any

import drjax
import jax
import numpy as np
import optax
from jax import P

from experiments.benchmarks.peers.plain_layers import plain_loss
from experiments.benchmarks.peers.plain_steps import first_states, make_steps, optimizers
from experiments.benchmarks.speed.jax_contenders import Rounds
from experiments.benchmarks.workloads import Workload, make_pool
from jaxlocal.types import Tree


def drjax_rounds(workload: Workload, params: Tree) -> Rounds:
    """Run rounds of DrJAX on all devices, with layers by hand."""
    mesh = jax.make_mesh((jax.device_count(),), ("workers",), (jax.sharding.AxisType.Auto,))
    place = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))
    model, own, shared = first_states(workload, params, place)
    pool, train = place(make_pool(workload), P()), _train(workload, mesh)

    def run(indices: np.ndarray) -> Any:
        nonlocal model, own, shared
        by_worker = place(indices.swapaxes(0, 1), P("workers"))
        model, own, shared, losses = train(model, own, shared, pool, by_worker)
        jax.block_until_ready(model)
        return losses.T

    return Rounds(run, lambda: jax.device_get(model))


def _train(workload: Workload, mesh: jax.sharding.Mesh) -> Callable:
    """The program of a round."""
    inner, outer = optimizers(workload)
    steps = make_steps(plain_loss(workload), inner)

    @drjax.program(placements={"workers": workload.workers})
    def train(model, own, shared, pool, indices):
        def work(start, state, index):
            params, state, losses = steps(pool, start, state, index)
            return jax.tree.map(lambda y, x: y - x, start, params), state, losses

        start = drjax.broadcast(model, mesh=mesh)
        moved, own, losses = drjax.map_fn(work, (start, own, indices), mesh=mesh)
        updates, shared = outer.update(drjax.reduce_mean(moved), shared, model)
        return optax.apply_updates(model, updates), own, shared, losses

    return jax.jit(train, donate_argnums=(0, 1, 2))
