"""Rounds written by hand in plain JAX, as well as a user could: how much jaxlocal itself costs.

A round is one program. Every device runs its workers one after another, each through all of its
steps, and keeps the sum of their models, so that the models never exist all at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import P, lax

from experiments.benchmarks.peers.plain_layers import plain_loss
from experiments.benchmarks.peers.plain_steps import Loss, first_states, make_steps, optimizers
from experiments.benchmarks.speed.jax_contenders import Rounds
from experiments.benchmarks.workloads import Workload, make_pool, model_of, scaled
from jaxlocal.models import training_loss
from jaxlocal.types import Tree


def plain_rounds(workload: Workload, params: Tree) -> Rounds:
    """Run rounds by hand with layers by hand."""
    return _rounds(workload, params, plain_loss(workload))


def library_layers_rounds(workload: Workload, params: Tree) -> Rounds:
    """Run rounds by hand with the layers of jaxlocal."""
    full = training_loss(model_of(workload), scaled, workload.classes)
    return _rounds(workload, params, lambda params, batch: full(params, {}, batch, None)[0])


def _rounds(workload: Workload, params: Tree, loss: Loss) -> Rounds:
    mesh = jax.make_mesh((jax.device_count(),), ("workers",), (jax.sharding.AxisType.Auto,))
    shard = {"local_sgd": _local_sgd, "diloco": _diloco}[workload.method](workload, loss)
    train = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(P(), P("workers"), P(), P(), P(None, "workers")),
        out_specs=(P(), P("workers"), P(), P(None, "workers")),
    )
    train = jax.jit(train, donate_argnums=(0, 1, 2))
    place = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))
    model, own, shared = first_states(workload, params, place)
    pool = place(make_pool(workload), P())

    def run(indices: np.ndarray) -> Any:
        nonlocal model, own, shared
        model, own, shared, losses = train(model, own, shared, pool, indices)
        jax.block_until_ready(model)
        return losses

    return Rounds(run, lambda: jax.device_get(model))


def _local_sgd(workload: Workload, loss: Loss) -> Callable:
    """The round of one device."""
    inner, _ = optimizers(workload)
    steps = make_steps(loss, inner)

    def shard(model, own, shared, pool, indices):
        start = lax.pcast(model, "workers", to="varying")

        def worker(total, one):
            state, index = one
            params, state, losses = steps(pool, start, state, index)
            return jax.tree.map(jnp.add, total, params), (state, losses)

        total, (own, losses) = lax.scan(worker, _zeros(start), (own, indices.swapaxes(0, 1)))
        model = jax.tree.map(lambda x: x / workload.workers, lax.psum(total, "workers"))
        return model, own, shared, losses.T

    return shard


def _diloco(workload: Workload, loss: Loss) -> Callable:
    """The round of one device, which sums up how far its workers have moved."""
    inner, outer = optimizers(workload)
    steps = make_steps(loss, inner)

    def shard(model, own, shared, pool, indices):
        start = lax.pcast(model, "workers", to="varying")

        def worker(total, one):
            state, index = one
            params, state, losses = steps(pool, start, state, index)
            return jax.tree.map(lambda t, y, x: t + (y - x), total, start, params), (state, losses)

        total, (own, losses) = lax.scan(worker, _zeros(start), (own, indices.swapaxes(0, 1)))
        moved = jax.tree.map(lambda x: x / workload.workers, lax.psum(total, "workers"))
        updates, shared = outer.update(moved, shared, model)
        return optax.apply_updates(model, updates), own, shared, losses.T

    return shard


_zeros: Callable[[Tree], Tree] = partial(jax.tree.map, jnp.zeros_like)
