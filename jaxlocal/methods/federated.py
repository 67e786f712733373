"""Federated methods: a server optimizer over the averages of the workers."""

import jax
import jax.numpy as jnp
import optax

from jaxlocal.errors import explain_arguments
from jaxlocal.methods.outer import diloco
from jaxlocal.methods.spec import OuterDefault, momentum_sgd
from jaxlocal.stages.gradient import GradFn
from jaxlocal.types import Method, Period


def fed_adam(
    learning_rate: float, momentum: float = 0.9, second_momentum: float = 0.99, tau: float = 1e-3
) -> optax.GradientTransformation:
    """The server optimizer of FedAdam: Adam without bias correction, whose v starts from τ².

        m ← β1 m + (1 − β1) d;  v ← β2 v + (1 − β2) d²;  y ← y − η m / (√v + τ)

    Args:
      learning_rate, momentum, second_momentum, tau: η, β1, β2 and τ.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, jax.tree.map(lambda x: jnp.full_like(x, tau**2), params)

    def update(gradient, state, params=None):
        decay = lambda b: lambda old, new: b * old + (1 - b) * new
        first = jax.tree.map(decay(momentum), state[0], gradient)
        second = jax.tree.map(decay(second_momentum), state[1], jax.tree.map(jnp.square, gradient))
        move = lambda m, v: -learning_rate * m / (jnp.sqrt(v) + tau)
        return jax.tree.map(move, first, second), (first, second)

    return optax.GradientTransformation(init, update)


FEDAVGM = OuterDefault("sgd", momentum_sgd, learning_rate=1.0, momentum=0.9)
FEDADAM = OuterDefault("fed_adam", fed_adam, learning_rate=0.01, momentum=0.9)


@explain_arguments
def fedavgm(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    period: Period | int = 1,
    outer_optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """FedAvgM: federated averaging with momentum on the server.

        every step:     x_i ← optimizer_i(x_i, g_i)
        every H steps:  d ← y − Σ_j a_j x_j;  m ← β m + d;  y ← y − η m;  x_i ← y

    Symbols: y the anchor, the model of the server; η and β the server's learning rate and momentum.

    Args:
      grad_fn, optimizer, period, optimizer_state, model_state, worker_map: as in `diloco`. The
        papers' clients run SGD; "reset" gives them a fresh optimizer in every round.
      outer_optimizer: the server's; by default `optax.sgd(1.0, momentum=0.9)`.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Source: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification", 2019, https://arxiv.org/abs/1909.06335; Reddi et al., "Adaptive
    Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> fedavgm(grad_fn, optax.sgd(0.1), period=10).outer.anchored
    True
    """
    return diloco(
        grad_fn,
        optimizer,
        period=period,
        outer_optimizer=outer_optimizer or FEDAVGM.build(),
        optimizer_state=optimizer_state,
        model_state=model_state,
        worker_map=worker_map,
    )


@explain_arguments
def fedadam(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    period: Period | int = 1,
    outer_optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """FedAdam: federated averaging with Adam on the server.

        every step:     x_i ← optimizer_i(x_i, g_i)
        every H steps:  d ← y − Σ_j a_j x_j;  m ← β1 m + (1 − β1) d;  v ← β2 v + (1 − β2) d²;
                        y ← y − η m / (√v + τ);  x_i ← y

    Symbols: y the anchor, the model of the server; η its learning rate. v starts from τ².

    Args:
      grad_fn, optimizer, period, optimizer_state, model_state, worker_map: as in `fedavgm`.
      outer_optimizer: the server's; by default η = 0.01, β1 = 0.9, β2 = 0.99, τ = 0.001. The paper
        tunes η for every task.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021,
    https://arxiv.org/abs/2003.00295, Algorithm 2.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> fedadam(grad_fn, optax.sgd(0.1), period=10).outer.anchored
    True
    """
    return diloco(
        grad_fn,
        optimizer,
        period=period,
        outer_optimizer=outer_optimizer or FEDADAM.build(),
        optimizer_state=optimizer_state,
        model_state=model_state,
        worker_map=worker_map,
    )
