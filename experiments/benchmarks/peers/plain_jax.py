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
from experiments.benchmarks.speed.jax_contenders import Rounds
from experiments.benchmarks.workloads import (
    ADAMW_RATE,
    LEARNING_RATE,
    Workload,
    make_pool,
    model_of,
    scaled,
)
from jaxlocal.models import training_loss
from jaxlocal.types import Tree

Loss = Callable[[Tree, Tree], jax.Array]  # loss(params, batch)


def plain_rounds(workload: Workload, params: Tree) -> Rounds:
    """Run rounds by hand with layers by hand."""
    return _rounds(workload, params, plain_loss(workload))


def library_layers_rounds(workload: Workload, params: Tree) -> Rounds:
    """Run rounds by hand with the layers of jaxlocal."""
    full = training_loss(model_of(workload), scaled, workload.classes)
    return _rounds(workload, params, lambda params, batch: full(params, {}, batch, None)[0])


def _rounds(workload: Workload, params: Tree, loss: Loss) -> Rounds:
    mesh = jax.make_mesh((jax.device_count(),), ("workers",), (jax.sharding.AxisType.Auto,))
    common, of_worker = jax.NamedSharding(mesh, P()), jax.NamedSharding(mesh, P("workers"))
    make = {"local_sgd": _local_sgd, "diloco": _diloco}[workload.method]
    init, shard = make(loss, workload.workers)
    train = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(P(), P("workers"), P(), P(), P(None, "workers")),
        out_specs=(P(), P("workers"), P(), P(None, "workers")),
    )
    train = jax.jit(train, donate_argnums=(0, 1, 2))
    pool = jax.device_put(make_pool(workload), common)
    own, shared = jax.jit(init, out_shardings=(of_worker, common))(params)
    model = jax.device_put(params, common)

    def run(indices: np.ndarray) -> Any:
        nonlocal model, own, shared
        model, own, shared, losses = train(model, own, shared, pool, indices)
        jax.block_until_ready(model)
        return losses

    return Rounds(run, lambda: jax.device_get(model))


def _local_sgd(loss: Loss, workers: int) -> tuple[Callable, Callable]:
    """The first states, of the workers and common, and the round of one device."""

    def shard(model, own, shared, pool, indices):
        start = lax.pcast(model, "workers", to="varying")

        def step(params, index):
            value, grads = jax.value_and_grad(loss)(params, _batch(pool, index))
            return jax.tree.map(lambda x, g: x - LEARNING_RATE * g, params, grads), value

        def worker(total, index):
            params, losses = lax.scan(step, start, index)
            return jax.tree.map(jnp.add, total, params), losses

        total, losses = lax.scan(worker, _zeros(start), indices.swapaxes(0, 1))
        model = jax.tree.map(lambda x: x / workers, lax.psum(total, "workers"))
        return model, own, shared, losses.T

    return lambda params: ((), ()), shard


def _diloco(loss: Loss, workers: int) -> tuple[Callable, Callable]:
    """As `_local_sgd`, with AdamW, whose states the workers keep, and Nesterov momentum outside."""
    inner, outer = optax.adamw(ADAMW_RATE), optax.sgd(0.7, momentum=0.9, nesterov=True)

    def init(params):
        stack = lambda x: jnp.broadcast_to(x, (workers, *x.shape))
        return jax.tree.map(stack, inner.init(params)), outer.init(params)

    def shard(model, own, shared, pool, indices):
        start = lax.pcast(model, "workers", to="varying")

        def step(carry, index):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, _batch(pool, index))
            updates, state = inner.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        def worker(total, one):
            state, index = one
            (params, state), losses = lax.scan(step, (start, state), index)
            return jax.tree.map(lambda t, y, x: t + (y - x), total, start, params), (state, losses)

        total, (own, losses) = lax.scan(worker, _zeros(start), (own, indices.swapaxes(0, 1)))
        gradient = jax.tree.map(lambda x: x / workers, lax.psum(total, "workers"))
        updates, shared = outer.update(gradient, shared, model)
        return optax.apply_updates(model, updates), own, shared, losses.T

    return init, shard


_zeros: Callable[[Tree], Tree] = partial(jax.tree.map, jnp.zeros_like)


def _batch(pool: Tree, index: jax.Array) -> Tree:
    return jax.tree.map(lambda x: x[index], pool)
