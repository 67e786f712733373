"""Rounds of FedJAX's federated averaging, with clients of as many examples as a round takes."""

import fedjax
import jax
import numpy as np
from fedjax.algorithms import fed_avg

from experiments.benchmarks.peers.plain_layers import plain_loss
from experiments.benchmarks.speed.jax_contenders import Rounds
from experiments.benchmarks.workloads import LEARNING_RATE, Workload, make_pool
from jaxlocal.types import Tree

jax.tree_map = jax.tree.map  # type: ignore[attr-defined]  # FedJAX calls it by its former name


def fedjax_rounds(workload: Workload, params: Tree) -> Rounds:
    """Run rounds of FedJAX, with layers by hand."""
    pool, loss = make_pool(workload), plain_loss(workload, in_loop=False)
    algorithm = fed_avg.federated_averaging(
        lambda params, batch, key: jax.grad(loss)(params, batch),
        fedjax.optimizers.sgd(LEARNING_RATE),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(workload.batch_size, skip_shuffle=True),
    )
    state, key = algorithm.init(params), jax.random.PRNGKey(0)

    def run(indices: np.ndarray) -> None:
        nonlocal state
        clients = [
            (worker, fedjax.ClientDataset({k: x[mine.ravel()] for k, x in pool.items()}), key)
            for worker, mine in enumerate(indices.swapaxes(0, 1))
        ]
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)

    return Rounds(run, lambda: jax.device_get(state.params))
