"""Federated methods: a server optimizer over the averages of the workers."""

import optax

from jaxlocal.errors import explain_arguments
from jaxlocal.methods.outer import diloco
from jaxlocal.methods.spec import OuterDefault, momentum_sgd
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.optimizers import fed_adam
from jaxlocal.types import Method, Period

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
        outer_optimizer=FEDAVGM.build() if outer_optimizer is None else outer_optimizer,
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
      outer_optimizer: the server's; by default `jaxlocal.stages.fed_adam(0.01)`: β1 = 0.9,
        β2 = 0.99, τ = 0.001. The paper tunes η for every task.

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
        outer_optimizer=FEDADAM.build() if outer_optimizer is None else outer_optimizer,
        optimizer_state=optimizer_state,
        model_state=model_state,
        worker_map=worker_map,
    )
