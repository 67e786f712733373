"""Least squares with gradient noise of a known variance, by MLL-SGD on several hub graphs."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import experiments
import jaxlocal
from experiments.bounding.moments import Moments, Problem, exact_moments
from jaxlocal import Layout, RoundFn, make_mesh
from jaxlocal.communication import topology
from jaxlocal.communication.bounds import MllBound, drift, mll_bound, noise_spread

PRESETS = Path(experiments.__file__).parent / "presets"
GRAPHS = {
    "complete": "complete",
    "ten hubs of the paper": str(PRESETS / "mll_ten_hubs.graph"),
    "star": "star",
    "ring": "ring",
    "path": "path",
}
RATES = [0.6, 0.9, 0.9, 0.9]  # of the workers of a hub
LAYOUT = Layout(10, len(RATES), rates=RATES)
PERIODS: dict[str, Any] = {"local_steps": 4, "hub_period": 2}
RUN: dict[str, Any] = {"steps": 16_000, "learning_rate": 0.0025}
EXAMPLES, SCALES, NOISE = 200, (1.0, 0.7, 0.5, 0.3, 0.2), 400.0


class Compared(NamedTuple):
    """A hub graph: what the theory says of it, and what was found."""

    graph: str
    zeta: float
    bound: MllBound
    consensus_bound: float  # of Σ a_i E‖x_i − u‖², by the lemma
    exact: Moments
    measured: list[float]  # mean of ‖∇F(u)‖² over the steps that begin a round, of each seed


def compare(graph: str, seeds: int) -> Compared:
    """Compute the bound and the exact moments on a hub graph, and train with several seeds."""
    adjacency = topology.hub_graph(GRAPHS[graph], LAYOUT.hubs)
    matrix = topology.mixing_matrix(adjacency, LAYOUT.hub_weight)
    zeta, problem = topology.zeta(matrix), in_own_basis()
    exact = exact_moments(problem, LAYOUT, matrix, **PERIODS, **RUN)
    task: dict[str, Any] = {
        "smoothness": max(problem.curvatures),
        "noise": NOISE,
        "gap": problem.gap,
    }
    spread, moved = (f(LAYOUT, zeta, **PERIODS) for f in (noise_spread, drift))
    consensus = 2 * RUN["learning_rate"] ** 2 * (NOISE * spread + moved * exact.at_workers)
    measured = [measure(matrix, seed) for seed in range(seeds)]
    bound = mll_bound(LAYOUT, zeta, **PERIODS, **RUN, **task)
    return Compared(graph, zeta, bound, consensus, exact, measured)


def _task() -> tuple[np.ndarray, np.ndarray]:
    """The examples' inputs [examples, features] and the optimum [features]."""
    random = np.random.default_rng(0)
    return random.normal(size=(EXAMPLES, len(SCALES))) * SCALES, np.ones(len(SCALES))


def in_own_basis() -> Problem:
    """The loss ‖A (w − w*)‖² / 2n in the basis of the eigenvectors of its Hessian, from w = 0."""
    inputs, optimum = _task()
    curvatures, basis = np.linalg.eigh(inputs.T @ inputs / EXAMPLES)
    return Problem(curvatures.tolist(), (-basis.T @ optimum).tolist(), NOISE)


def measure(matrix: np.ndarray, seed: int) -> float:
    """Train with MLL-SGD; returns the mean of ‖∇F(u)‖² over the models at the starts of rounds."""
    inputs, optimum = _task()
    a, targets = jnp.asarray(inputs, jnp.float32), jnp.asarray(inputs @ optimum, jnp.float32)
    deviation = (NOISE / len(SCALES)) ** 0.5

    def loss(w, batch, key):
        noise = deviation * jax.random.normal(key, w.shape)  # its gradient, of variance σ²
        return 0.5 * jnp.mean((a @ w - targets) ** 2) + noise @ w

    method = jaxlocal.mll_sgd(
        jaxlocal.gradients(loss),
        optax.sgd(RUN["learning_rate"]),
        matrix=matrix,
        **PERIODS,
        worker_map="vmap",
    )
    round_fn = RoundFn(method, LAYOUT, make_mesh(LAYOUT, shape=(1, 1)))
    state = round_fn.init(jnp.zeros(len(SCALES)), jax.random.key(seed))
    period = PERIODS["local_steps"] * PERIODS["hub_period"]
    batches, norms = np.zeros((period, *LAYOUT.shape), np.float32), []
    for _ in range(RUN["steps"] // period):
        u = np.asarray(round_fn.mean(state)[0], np.float64)
        norms.append(np.square(inputs.T @ (inputs @ (u - optimum)) / EXAMPLES).sum())
        state, _ = round_fn(state, batches)
    return float(np.mean(norms))
