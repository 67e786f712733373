"""The convergence bound of Multi-Level Local SGD; docs/theory_mll.md derives it."""

from typing import NamedTuple

import numpy as np

from jaxlocal.errors import ConfigurationError, check_integer
from jaxlocal.parallel.layout import Layout


class MllBound(NamedTuple):
    """A bound of the mean squared gradient norm at the average model, by what causes it."""

    start: float  # the distance of the first model from the least loss
    noise: float  # of the average of the workers' gradients
    disagreement: float  # of the workers' models

    @property
    def total(self) -> float:
        """The bound."""
        return sum(self)


def mll_bound(
    layout: Layout,
    zeta: float,
    *,
    local_steps: int,
    hub_period: int,
    steps: int,
    learning_rate: float,
    smoothness: float,
    noise: float,
    gap: float,
) -> MllBound:
    """Bound the mean squared gradient norm of MLL-SGD with plain SGD.

        (1/T) Σ_t E‖∇F(u_t)‖² ≤ 2 (F(x_0) − F_inf) / (η P T) + (η L σ² / P) Σ_i a_i² p_i
            + (2 p_max η² L² σ² / P) (W_0 (τ − 1)/2 + W_1 ((qτ − τ)/2 + qτ ζ² / (1 − ζ²)))

    with P = Σ a_i p_i, W_0 = Σ a_i p_i (1 − a_i), W_1 = Σ a_i p_i (v_i − a_i), for workers that all
    draw from the distribution whose loss is F.

    Args:
      layout: the workers: a_i their weights, v_i those in their hub, p_i their rates.
      zeta: ζ of the hub network, see `topology.zeta`; its matrix is in detailed balance, as
        `topology.mixing_matrix` makes it.
      local_steps: τ.
      hub_period: q.
      steps: T, a multiple of qτ.
      learning_rate: η, constant.
      smoothness: L: the gradient of F is L-Lipschitz.
      noise: σ², which E‖g_i − ∇F(x_i)‖² does not exceed.
      gap: F(x_0) − F_inf.

    Returns:
      The three terms of the bound.

    Raises:
      ConfigurationError: η is too large for the bound, ζ is not in [0, 1), or T is no multiple.

    Source: derived in docs/theory_mll.md. Castiglia, Das, Patterson, "Multi-Level Local SGD", ICLR
    2021, https://arxiv.org/abs/2007.13819, has a bound of the same form in Theorem 1.

    >>> task = {"steps": 8000, "learning_rate": 0.01, "smoothness": 1, "noise": 1, "gap": 1}
    >>> bound = mll_bound(Layout(4, 5), 0.5, local_steps=4, hub_period=2, **task)
    >>> [round(term, 6) for term in bound]
    [0.025, 0.0005, 0.000425]
    """
    check_integer("local_steps", local_steps)
    check_integer("hub_period", hub_period)
    if not 0 <= zeta < 1:
        raise ConfigurationError(f"zeta must be in [0, 1), got {zeta}")
    if steps < 1 or steps % (local_steps * hub_period):
        raise ConfigurationError(
            f"the bound is for a multiple of q·τ = {local_steps * hub_period} steps, got {steps}"
        )
    step_size = rate_condition(
        layout,
        zeta,
        local_steps=local_steps,
        hub_period=hub_period,
        step=learning_rate * smoothness,
    )
    if step_size > 1:
        raise ConfigurationError(
            f"the bound needs a smaller learning rate: for η = {learning_rate:g}, L = "
            f"{smoothness:g} and ζ = {zeta:.4g} its condition is {step_size:.4g}, more than 1"
        )
    a, p, average_rate = layout.weight, layout.rate, float((layout.weight * layout.rate).sum())
    spread = noise_spread(layout, zeta, local_steps=local_steps, hub_period=hub_period)
    eta = learning_rate
    return MllBound(
        start=2 * gap / (eta * average_rate * steps),
        noise=eta * smoothness * noise * float((a**2 * p).sum()) / average_rate,
        disagreement=2 * float(p.max()) * (eta * smoothness) ** 2 * noise * spread / average_rate,
    )


def noise_spread(layout: Layout, zeta: float, *, local_steps: int, hub_period: int) -> float:
    """W_0 (τ − 1)/2 + W_1 ((qτ − τ)/2 + qτ ζ²/(1 − ζ²)): the mean of Σ a_i E‖x_i − u‖² over the
    steps is at most η²σ² times this, where gradients are noise alone."""
    a, p = layout.weight, layout.rate
    in_hub = a / layout.hub_weight[:, None]
    alone, in_hubs = float((a * p * (1 - a)).sum()), float((a * p * (in_hub - a)).sum())
    period = local_steps * hub_period
    between = (period - local_steps) / 2 + period * zeta**2 / (1 - zeta**2)
    return alone * (local_steps - 1) / 2 + in_hubs * between


def drift(layout: Layout, zeta: float, *, local_steps: int, hub_period: int) -> float:
    """(1 − p_min) B_2 + p_max B²: how much the mean of Σ a_i E‖x_i − u‖² may grow by the gradients,
    in units of η² times the mean of Σ a_i p_i E‖∇F(x_i)‖²."""
    period, p = local_steps * hub_period, layout.rate
    squares = period - 1 + period * zeta**2 / (1 - zeta**2)
    sums = period - 1 + period * zeta / (1 - zeta)
    return float((1 - p.min()) * squares + p.max() * sums**2)


def rate_condition(
    layout: Layout, zeta: float, *, local_steps: int, hub_period: int, step: float
) -> float:
    """What must not exceed 1 for the bound: ηL (P + max a_i (1 − p_i)) + 2 p_max (ηL)² `drift`.

    Args:
      step: ηL.
    """
    a, p = layout.weight, layout.rate
    first = float((a * p).sum() + (a * (1 - p)).max())
    moved = drift(layout, zeta, local_steps=local_steps, hub_period=hub_period)
    return float(step * first + 2 * np.max(p) * step**2 * moved)
