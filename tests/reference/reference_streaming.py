"""Streaming DiLoCo as a slow float64 NumPy loop; the conventions are those of `reference`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from reference import Array, Gradient, Schedule


def streaming_diloco(
    gradient: Gradient,
    start: Array,
    learning_rate: Schedule,
    rounds: Sequence[int],
    worker_weights: ArrayLike,
    momentum: float,
    outer_learning_rate: float,
    outer_momentum: float,
    fragments: Sequence[Sequence[int]],
    delay: int,
    mixing_factor: float,
    active: ArrayLike | None = None,
) -> Array:
    """Algorithm 2 of Douillard et al., arXiv 2501.18512, Nesterov outside, heavy-ball inside.

    At step t every worker takes its step: m_i ← βm_i + g_i, x_i ← x_i − ηm_i. A fragment p that is
    due at step t_p is sent at t_p − τ, Δ = Σ a_i (y_p − x_ip), and received at t_p: v_p ← βv_p + Δ,
    y_p ← y_p − γ(Δ + βv_p), x_ip ← αx_ip + (1 − α)y_p. `rounds` are the steps from one fragment's
    t_p to the next one's, `fragments` the coordinates of each.

    All models before the first step and after every step, [steps + 1, K, dim].
    """
    weights = np.asarray(worker_weights, np.float64)
    weights = weights / weights.sum()
    anchor = np.array(start, np.float64)
    velocity = np.zeros_like(anchor)
    models = [anchor.copy() for _ in weights]
    momenta = [np.zeros_like(anchor) for _ in weights]
    received_at = np.cumsum(rounds)
    in_flight: dict[int, Array] = {}
    trajectory = [np.stack(models)]
    for step in range(1, received_at[-1] + 1):
        for worker in range(len(weights)):
            if active is None or np.asarray(active)[step - 1, worker]:
                g = np.asarray(gradient(worker, models[worker], step - 1), np.float64)
                momenta[worker] = momentum * momenta[worker] + g
                models[worker] = models[worker] - learning_rate(step - 1) * momenta[worker]
        for number, due in enumerate(received_at):
            places = list(fragments[number % len(fragments)])
            if step == due - delay:
                moved = [anchor[places] - model[places] for model in models]
                in_flight[number] = sum(a * d for a, d in zip(weights, moved, strict=True))
            if step == due:
                delta = in_flight.pop(number)
                velocity[places] = outer_momentum * velocity[places] + delta
                update = delta + outer_momentum * velocity[places]
                anchor[places] = anchor[places] - outer_learning_rate * update
                for model in models:
                    mixed = mixing_factor * model[places] + (1 - mixing_factor) * anchor[places]
                    model[places] = mixed
        trajectory.append(np.stack(models))
    return np.stack(trajectory)
