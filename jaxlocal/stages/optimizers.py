"""Optimizers that follow the step of the run."""

import jax
import optax


def scale_by_step(schedule: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """An optax step of −η_t where t is the run's step, not the number of steps that this worker has
    taken.

    The two differ where workers skip steps by their rates. Ends a chain, as
    `optax.scale_by_learning_rate` does.

    >>> step = scale_by_step(lambda step: 0.1 / (1 + step))
    >>> round(float(step.update(jnp.ones(()), step.init(None), step=1)[0]), 3)
    -0.05
    """

    def update(updates, state, params=None, *, step, **others):
        rate = schedule(step) if callable(schedule) else schedule
        return jax.tree.map(lambda u: (-rate * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
