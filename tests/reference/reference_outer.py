"""SlowMo and DiLoCo as slow float64 NumPy loops; the conventions are those of `reference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from reference import Array, Gradient, Schedule, weighted_mean


def slowmo(
    gradient: Gradient,
    start: Array,
    learning_rate: Schedule,
    periods: Sequence[int],
    worker_weights: ArrayLike,
    momentum: float,
    slow_learning_rate: float,
    slow_momentum: float,
    at_sync: str,
) -> Array:
    """Algorithm 1 of Wang, Tantia, Ballas, Rabbat, arXiv 1910.00643, with heavy-ball inside.

    m_i ← β_0 m_i + g_i, x_i ← x_i − η m_i for H steps; u ← βu + (y − Σ a_i x_i) / η with the mean η
    of these steps; y ← y − αηu; x_i ← y. The momenta m_i are kept, averaged or zeroed.
    """
    slow = np.zeros_like(start, np.float64)

    def outer(anchor: Array, mean: Array, steps: range) -> Array:
        nonlocal slow
        rate = sum(learning_rate(step) for step in steps) / len(steps)
        slow = slow_momentum * slow + (anchor - mean) / rate
        return anchor - slow_learning_rate * rate * slow

    return _outer_loop(
        outer, gradient, start, learning_rate, periods, worker_weights, momentum, at_sync
    )


def diloco(
    gradient: Gradient,
    start: Array,
    learning_rate: Schedule,
    periods: Sequence[int],
    worker_weights: ArrayLike,
    momentum: float,
    outer_learning_rate: float,
    outer_momentum: float,
    at_sync: str = "keep",
) -> Array:
    """Algorithm 1 of Douillard et al., arXiv 2311.08105, Nesterov outside, heavy-ball inside.

    d = y − Σ a_i x_i; v ← βv + d; y ← y − α(d + βv); x_i ← y.
    """
    velocity = np.zeros_like(start, np.float64)

    def outer(anchor: Array, mean: Array, steps: range) -> Array:
        nonlocal velocity
        pseudo_gradient = anchor - mean
        velocity = outer_momentum * velocity + pseudo_gradient
        return anchor - outer_learning_rate * (pseudo_gradient + outer_momentum * velocity)

    return _outer_loop(
        outer, gradient, start, learning_rate, periods, worker_weights, momentum, at_sync
    )


def _outer_loop(
    outer: Callable[[Array, Array, range], Array],
    gradient: Gradient,
    start: Array,
    learning_rate: Schedule,
    periods: Sequence[int],
    weights: ArrayLike,
    momentum: float,
    at_sync: str,
) -> Array:
    """All models before the first step and after every step, what ends a round included."""
    workers, step = np.size(weights), 0
    anchor = np.asarray(start, np.float64)
    models = [anchor] * workers
    momenta = [np.zeros_like(anchor)] * workers
    trajectory = [np.stack(models)]
    for local_steps in periods:
        for _ in range(local_steps):
            for worker in range(workers):
                g = np.asarray(gradient(worker, models[worker], step), np.float64)
                momenta[worker] = momentum * momenta[worker] + g
                models[worker] = models[worker] - learning_rate(step) * momenta[worker]
            step += 1
            trajectory.append(np.stack(models))
        steps = range(step - local_steps, step)
        anchor = outer(anchor, weighted_mean(models, weights), steps)
        models = [anchor] * workers
        if at_sync == "average":
            momenta = [weighted_mean(momenta, weights)] * workers
        elif at_sync == "reset":
            momenta = [np.zeros_like(anchor)] * workers
        trajectory[-1] = np.stack(models)
    return np.stack(trajectory)
