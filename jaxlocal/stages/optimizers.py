"""Optimizers whose learning rate follows the step of the run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlocal.errors import ConfigurationError
from jaxlocal.periods.schedules import check_rate
from jaxlocal.types import Tree


def scale_by_step(schedule: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Scale updates by −η_t, where t is the step of the run.

    The steps of the run and those that a worker has taken differ where workers skip steps by their
    rates; `optax.scale_by_learning_rate`, whose place this takes at the end of a chain, counts the
    latter.

    Args:
      schedule: η by step, or a number.

    Returns:
      A transformation whose update needs `step`, which the stages of jaxlocal give it.

    >>> minus_rate = scale_by_step(lambda step: 0.1 / (1 + step))
    >>> updates, _ = minus_rate.update(jnp.ones(()), minus_rate.init(None), step=1)
    >>> round(float(updates), 3)
    -0.05
    """
    check_rate(schedule)

    def update(updates, state, params=None, *, step, **others):
        rate = schedule(step) if callable(schedule) else schedule
        return jax.tree.map(lambda u: (-rate * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class ScheduledOptimizer(optax.GradientTransformationExtraArgs):
    """An optax optimizer that knows its learning rate; see `scheduled`."""

    learning_rate: optax.ScalarOrSchedule


def scheduled(
    make: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    **arguments: Any,
) -> ScheduledOptimizer:
    """Make an optax optimizer whose schedule others can read, so that it is given only once.

    The schedule follows the step of the run, not the steps that a worker has taken. Rules for the
    period such as `periods.qsr`, and `slowmo`, read `optimizer.learning_rate`; a method refuses a
    rule that reads another schedule.

    A chain is scheduled as a whole, since `optax.chain` does not pass the schedule on:
    `scheduled(lambda learning_rate: optax.chain(optax.clip(1.0), optax.sgd(learning_rate)), ...)`.

    Args:
      make: an optax optimizer that takes `learning_rate`, such as `optax.sgd` or `optax.adamw`.
      learning_rate: η by step, or a number.
      **arguments: further arguments of `make`.

    Returns:
      An optimizer with the attribute `learning_rate`. Its update needs `step`, which the stages of
      jaxlocal give it.

    >>> from jaxlocal import periods
    >>> optimizer = scheduled(optax.sgd, optax.cosine_decay_schedule(0.5, 200), momentum=0.9)
    >>> period = periods.qsr(optimizer.learning_rate, coefficient=1.0, base=4)
    >>> period.length(0, 200), period.length(100, 100)
    (4, 16)
    """
    check_rate(learning_rate)
    if not callable(make):
        raise ConfigurationError(
            f"scheduled takes a function that makes an optimizer, such as optax.sgd, got {make!r}"
        )
    make(learning_rate=0.0, **arguments)  # a wrong argument is refused here
    at = lambda step: learning_rate(step) if callable(learning_rate) else learning_rate
    init = lambda params: make(learning_rate=at(jnp.int32(0)), **arguments).init(params)

    def update(updates: Tree, state: Tree, params: Tree = None, *, step: Any, **others: Any):
        inner = make(learning_rate=at(step), **arguments)
        return optax.with_extra_args_support(inner).update(updates, state, params, **others)

    optimizer = ScheduledOptimizer(init, update)
    optimizer.learning_rate = learning_rate
    return optimizer


def fed_adam(
    learning_rate: float, momentum: float = 0.9, second_momentum: float = 0.99, tau: float = 1e-3
) -> optax.GradientTransformation:
    """The server optimizer of FedAdam: Adam without bias correction, whose v starts from τ².

        m ← β1 m + (1 − β1) d;  v ← β2 v + (1 − β2) d²;  y ← y − η m / (√v + τ)

    Args:
      learning_rate, momentum, second_momentum, tau: η, β1, β2 and τ.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021,
    https://arxiv.org/abs/2003.00295.

    >>> server = fed_adam(0.1)
    >>> updates, _ = server.update(jnp.ones(()), server.init(jnp.zeros(())))
    >>> round(float(updates), 4)
    -0.099
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
