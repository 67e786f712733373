"""Each paper's algorithm as slow float64 NumPy loops, the reference for the fast library.

The loops follow the equations, one worker after another, and import nothing of jaxlocal.
A model is one vector of `dim` numbers; `gradient(worker, x, step)` and `learning_rate(step)`
are functions of the global 0-based step. A trajectory holds the models of all workers before
the first step and after every step, `[steps + 1, workers, dim]`, averaging included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Gradient = Callable[[int, Array, int], Array]
Schedule = Callable[[int], float]
AtSync = Literal["keep", "average", "reset"]


class TwoQuadratics(NamedTuple):
    first: Array  # a_1, unit [2]
    second: Array  # a_2, unit [2]
    start: Array  # the unit slow eigenvector [2]
    final_loss: float  # F(x_R) in closed form
    lower_bound: float  # L / (4e (R + 1/2))


def weighted_mean(models: Sequence[Array] | Array, weights: ArrayLike) -> Array:
    """u = Σ w_i x_i / Σ w_i."""
    shares = _float64(weights) / np.sum(weights)
    return sum(share * model for share, model in zip(shares, models, strict=True))


def mixing_matrix(adjacency: ArrayLike, hub_weights: ArrayLike) -> Array:
    """H_ij = c b_i on edges, H_jj = 1 − Σ_{i≠j} H_ij; the adjacency diagonal is ignored.

    c = 1 / max_j Σ b_i over j and its neighbours. Columns sum to one and H b = b, so hub mixing
    y_d = Σ_j H_jd z_j keeps Σ b_d z_d. Condition on H: MLL-SGD, Castiglia et al., arXiv 2007.13819.
    """
    adjacency, weights = np.asarray(adjacency, bool), _float64(hub_weights)
    hubs = len(weights)
    neighbours = [[i for i in range(hubs) if i != j and adjacency[i, j]] for j in range(hubs)]
    scale = 1 / max(weights[j] + sum(weights[i] for i in neighbours[j]) for j in range(hubs))
    mixing = np.zeros((hubs, hubs))
    for j in range(hubs):
        for i in neighbours[j]:
            mixing[i, j] = scale * weights[i]
        mixing[j, j] = 1 - sum(mixing[i, j] for i in neighbours[j])
    return mixing


def mll_sgd(
    gradient: Gradient,
    start: Array,
    learning_rate: Schedule,
    steps: int,
    steps_per_hub_average: int,
    hub_averages_per_mix: int,
    worker_weights: ArrayLike,
    hub_of_worker: Sequence[int],
    mixing: Array,
    active: NDArray[np.bool_],
) -> Array:
    """Multi-Level Local SGD, Algorithm 1 of Castiglia, Das, Patterson, arXiv 2007.13819.

    every step: x_i ← x_i − η g_i where active[step, i]; every τ: x_i ← z_d = Σ_{i in d} v_i x_i;
    every qτ: x_i ← y_d = Σ_j H_jd z_j. `start` is `[dim]`, or `[workers, dim]` for unequal starts.
    """
    models = _start(start, len(hub_of_worker))
    trajectory = [np.stack(models)]
    for step in range(steps):
        for worker in range(len(models)):
            if active[step, worker]:
                g = _float64(gradient(worker, models[worker], step))
                models[worker] = models[worker] - learning_rate(step) * g
        done = step + 1
        if done % steps_per_hub_average == 0:
            hubs = _hub_averages(models, worker_weights, hub_of_worker, len(mixing))
            if done % (steps_per_hub_average * hub_averages_per_mix) == 0:
                hubs = [sum(mixing[j, d] * z for j, z in enumerate(hubs)) for d in range(len(hubs))]
            models = [hubs[hub] for hub in hub_of_worker]
        trajectory.append(np.stack(models))
    return np.stack(trajectory)


def mll_sgd_matrix(
    gradient: Gradient,
    start: Array,
    learning_rate: Schedule,
    steps: int,
    steps_per_hub_average: int,
    hub_averages_per_mix: int,
    worker_weights: ArrayLike,
    hub_of_worker: Sequence[int],
    mixing: Array,
    active: NDArray[np.bool_],
) -> Array:
    """MLL-SGD as X ← (X − ηG) T, one column of X a worker (arXiv 2007.13819).

    T = Z every qτ steps, Z_ij = H_{d(i)d(j)} v_i; else V every τ, which is Z at H = I; else I.
    """
    columns = np.stack(_start(start, len(hub_of_worker)), axis=1)
    hub_average = _transition(worker_weights, hub_of_worker, np.eye(len(mixing)))
    hub_mix = _transition(worker_weights, hub_of_worker, mixing)
    trajectory = [columns.T]
    for step in range(steps):
        gradients = [_float64(gradient(worker, x, step)) for worker, x in enumerate(columns.T)]
        transition = np.eye(columns.shape[1])
        if (step + 1) % (steps_per_hub_average * hub_averages_per_mix) == 0:
            transition = hub_mix
        elif (step + 1) % steps_per_hub_average == 0:
            transition = hub_average
        update = learning_rate(step) * np.stack(gradients, axis=1) * active[step]
        columns = (columns - update) @ transition
        trajectory.append(columns.T)
    return np.stack(trajectory)


def local_sgd(
    gradient: Gradient,
    start: Array,
    learning_rate: Schedule,
    periods: Sequence[int],
    worker_weights: ArrayLike,
    momentum: float = 0.0,
    nesterov: bool = False,
    at_sync: AtSync = "keep",
) -> Array:
    """Local SGD: after every H of `periods` local steps the models become Σ a_i x_i.

    m_i ← β m_i + g_i; x_i ← x_i − η m_i, with Nesterov x_i ← x_i − η (g_i + β m_i). A sync keeps
    the momenta local, averages or zeroes them. Stich, ICLR 2019, arXiv 1805.09767.
    """

    def update(x: Array, state: tuple, g: Array, rate: float) -> tuple[Array, tuple]:
        m = momentum * state[0] + g
        return x - rate * (g + momentum * m if nesterov else m), (m,)

    return _local_optimizer(
        update, (0.0,), gradient, start, learning_rate, periods, worker_weights, at_sync
    )


def local_adamw(
    gradient: Gradient,
    start: Array,
    learning_rate: Schedule,
    periods: Sequence[int],
    worker_weights: ArrayLike,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    at_sync: AtSync = "keep",
) -> Array:
    """Local AdamW: every worker runs AdamW, after every H of `periods` steps x_i ← Σ a_i x_i.

    m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; x ← x − η (m̂/(√v̂ + ε) + λx), m̂ = m/(1−β₁ⁿ),
    v̂ = v/(1−β₂ⁿ) (Loshchilov, Hutter, arXiv 1711.05101; locally: Gu et al., arXiv 2310.14423). A
    sync keeps m, v and n, averages m and v and keeps n, or zeroes all three; η always follows the
    global step.
    """

    def update(x: Array, state: tuple, g: Array, rate: float) -> tuple[Array, tuple]:
        m = beta1 * state[0] + (1 - beta1) * g
        v = beta2 * state[1] + (1 - beta2) * g**2
        n = state[2] + 1
        adam = m / (1 - beta1**n) / (np.sqrt(v / (1 - beta2**n)) + epsilon)
        return x - rate * (adam + weight_decay * x), (m, v, n)

    return _local_optimizer(
        update, (0.0, 0.0, 0), gradient, start, learning_rate, periods, worker_weights, at_sync
    )


def data_parallel(
    gradient: Gradient,
    start: Array,
    learning_rate: Schedule,
    steps: int,
    worker_weights: ArrayLike,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> Array:
    """One model [steps + 1, dim] on g = Σ a_i g_i(x): m ← βm + g; x ← x − η m, or − η (g + βm)."""
    x = np.array(start, np.float64)
    velocity, trajectory = np.zeros_like(x), [x]
    for step in range(steps):
        workers = range(np.size(worker_weights))
        g = weighted_mean([_float64(gradient(i, x, step)) for i in workers], worker_weights)
        velocity = momentum * velocity + g
        x = x - learning_rate(step) * (g + momentum * velocity if nesterov else velocity)
        trajectory.append(x)
    return np.stack(trajectory)


def two_quadratics(
    rounds: int, local_steps: int, learning_rate: float, smoothness: float = 1.0
) -> TwoQuadratics:
    """f_i(x) = (L/2)(a_iᵀx)², two nodes: an instance on which Local SGD needs Ω(K/T).

    cos∠(a_1, a_2) = c = 1 − 1/(R + ½), start along a_1 − a_2; with s = 1 − (1 − ηL)^K
    F(x_R) = (L/4)(1 − c)(1 − s(1 − c)/2)^{2R} ≥ L/(4e(R + ½)). After Qin et al., arXiv 2201.12719.
    """
    gap = 1 / (rounds + 0.5)
    along, across = math.sqrt(1 - gap / 2), math.sqrt(gap / 2)
    shrink = 1 - (1 - learning_rate * smoothness) ** local_steps
    final_loss = smoothness / 4 * gap * (1 - shrink * gap / 2) ** (2 * rounds)
    lower_bound = smoothness / (4 * math.e * (rounds + 0.5))
    first, second = np.array([along, across]), np.array([along, -across])
    return TwoQuadratics(first, second, np.array([0.0, 1.0]), final_loss, lower_bound)


def two_quadratics_losses(
    rounds: int, local_steps: int, learning_rate: float, smoothness: float = 1.0
) -> Array:
    """F(x_0) ... F(x_R) of `two_quadratics`, by running Local SGD on it."""
    problem = two_quadratics(rounds, local_steps, learning_rate, smoothness)
    nodes = (problem.first, problem.second)
    x, losses = problem.start, []
    for _ in range(rounds + 1):
        losses.append(sum(smoothness / 2 * float(a @ x) ** 2 for a in nodes) / 2)
        first, second = x, x
        for _ in range(local_steps):
            first = first - learning_rate * smoothness * (nodes[0] @ first) * nodes[0]
            second = second - learning_rate * smoothness * (nodes[1] @ second) * nodes[1]
        x = (first + second) / 2
    return np.array(losses)


def _float64(values: ArrayLike) -> Array:
    return np.asarray(values, np.float64)


def _start(start: ArrayLike, workers: int) -> list[Array]:
    start = _float64(start)
    return list(np.broadcast_to(start, (workers, start.shape[-1])).copy())


def _hub_averages(
    models: list[Array], weights: ArrayLike, hub_of_worker: Sequence[int], hubs: int
) -> list[Array]:
    """z_d = Σ_{i in d} w_i x_i / Σ_{i in d} w_i."""
    averages = []
    for hub in range(hubs):
        members = [worker for worker, its_hub in enumerate(hub_of_worker) if its_hub == hub]
        averages.append(weighted_mean([models[i] for i in members], np.take(weights, members)))
    return averages


def _transition(weights: ArrayLike, hub_of_worker: Sequence[int], mixing: Array) -> Array:
    """Z_ij = H_{d(i)d(j)} v_i."""
    weights, hub_of_worker = _float64(weights), np.asarray(hub_of_worker)
    transition = np.zeros((len(weights), len(weights)))
    for i, hub in enumerate(hub_of_worker):
        share = weights[i] / weights[hub_of_worker == hub].sum()
        for j, other_hub in enumerate(hub_of_worker):
            transition[i, j] = mixing[hub, other_hub] * share
    return transition


def _local_optimizer(
    update: Callable[[Array, tuple, Array, float], tuple[Array, tuple]],
    zero_state: tuple,
    gradient: Gradient,
    start: ArrayLike,
    learning_rate: Schedule,
    periods: Sequence[int],
    weights: ArrayLike,
    at_sync: AtSync,
) -> Array:
    """Local OPT (arXiv 2310.14423): H updates on every worker's own state, then one average."""
    workers, step = np.size(weights), 0
    models, states = _start(start, workers), [zero_state] * workers
    trajectory = [np.stack(models)]
    for local_steps in periods:
        for _ in range(local_steps):
            for worker, x in enumerate(models):
                g = _float64(gradient(worker, x, step))
                models[worker], states[worker] = update(x, states[worker], g, learning_rate(step))
            step += 1
            trajectory.append(np.stack(models))
        models = [weighted_mean(models, weights)] * workers
        if at_sync == "average":
            parts = zip(*states, strict=True)
            states = [tuple(weighted_mean(part, weights) for part in parts)] * workers
        elif at_sync == "reset":
            states = [zero_state] * workers
        trajectory[-1] = np.stack(models)
    return np.stack(trajectory)
