"""Exact second moments of MLL-SGD on a quadratic loss, in float64.

F(x) = Σ_k l_k x_k² / 2, with gradients l_k x_k + ξ of independent noise: each coordinate is a row
x [K] of the K workers' values, which a step takes to (x − η θ ∘ (l x + ξ)) T with T = I, V or Z.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxlocal import Layout

Array = np.ndarray


class Moments(NamedTuple):
    """Means over the steps of a run."""

    gradient: float  # E‖∇F(u)‖²
    consensus: float  # Σ a_i E‖x_i − u‖²
    at_workers: float  # Σ a_i p_i E‖∇F(x_i)‖²


class Problem(NamedTuple):
    """A quadratic loss with its minimum at zero, and where a run starts."""

    curvatures: Sequence[float]  # l_k; the largest is L
    start: Sequence[float]
    noise: float  # σ², spread evenly over the coordinates

    @property
    def gap(self) -> float:
        """F(x_0) − F_inf."""
        pairs = zip(self.curvatures, self.start, strict=True)
        return sum(curvature * x**2 for curvature, x in pairs) / 2


def exact_moments(
    problem: Problem,
    layout: Layout,
    matrix: Array,
    *,
    local_steps: int,
    hub_period: int,
    steps: int,
    learning_rate: float,
) -> Moments:
    """The means of the moments over the models before each step, without any sampling."""
    a, rates = layout.weight.reshape(-1), layout.rate.reshape(-1)
    apart = np.eye(len(a)) - np.outer(a, np.ones_like(a))  # x (I − a 1ᵀ) is x_i − u
    averages = list(_averages(layout, matrix, local_steps, hub_period))
    total = np.zeros(3)
    noise = problem.noise / len(problem.curvatures)
    for curvature, start in zip(problem.curvatures, problem.start, strict=True):
        moment = np.full((len(a), len(a)), float(start) ** 2)  # E x_i x_j
        for step in range(steps):
            difference = np.einsum("ij,ik,kj->j", apart, moment, apart, optimize=True)
            gradients = curvature**2 * np.array([a @ moment @ a, a * rates @ np.diag(moment)])
            total += [gradients[0], a @ difference, gradients[1]]
            moment = _after_step(moment, learning_rate, curvature, noise, rates)
            average = averages[step % len(averages)]
            moment = moment if average is None else average.T @ moment @ average
    return Moments(*map(float, total / steps))


def _after_step(moment: Array, eta: float, curvature: float, noise: float, rates: Array) -> Array:
    """E of (x_i − η θ_i (l x_i + ξ_i)) (x_j − …), where θ_i² = θ_i."""
    kept = 1 - eta * curvature * rates
    after = np.outer(kept, kept) * moment
    own = np.diag(moment) * (1 - 2 * eta * curvature * rates + (eta * curvature) ** 2 * rates)
    np.fill_diagonal(after, own + eta**2 * noise * rates)
    return after


def _averages(
    layout: Layout, matrix: Array, local_steps: int, hub_period: int
) -> Iterator[Array | None]:
    """T of each step of a period: V_ij = v_i in a hub, Z_ij = H_{d(i)d(j)} v_i, None for I."""
    share = (layout.weight / layout.hub_weight[:, None]).reshape(-1)
    hub = np.repeat(np.arange(layout.hubs), layout.workers_per_hub)
    for step in range(1, local_steps * hub_period + 1):
        if step == local_steps * hub_period:
            yield matrix[np.ix_(hub, hub)] * share[:, None]
        elif step % local_steps == 0:
            yield (hub[:, None] == hub[None]) * share[:, None]
        else:
            yield None
