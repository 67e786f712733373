"""An outer optimizer steps on the pseudo-gradient: how far the workers have moved on average."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxlocal.parallel.collectives import broadcast_to_workers, worker_shapes
from jaxlocal.periods.schedules import check_rate
from jaxlocal.stages.partial_sync import check_common
from jaxlocal.stages.sync import StatePolicy
from jaxlocal.stages.updates import init_of, lenient, update_of
from jaxlocal.types import Info, Leaf, Memory, Message, Mixer, Stage, Tree

# The least learning rate that a pseudo-gradient is divided by.
_LEAST_RATE = 1e-12


class OuterMemory(NamedTuple):
    """What an outer step carries from round to round."""

    optimizer: Tree  # state of the outer optimizer
    began: Leaf  # int32 []: the step at which the round began


def outer_step(
    mixer: Mixer,
    outer_optimizer: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    optimizer_state: str = "keep",
    optimizer: optax.GradientTransformation | None = None,
    model_state: str = "keep",
) -> Stage:
    """Take a step of an outer optimizer on the pseudo-gradient; all workers restart from it.

        d ← Σ_i a_i (y − x_i) / η;  y ← y + η · outer(d);  x_i ← y

    y is the anchor, the model from which all workers started the round.

    Args:
      mixer: one that makes all workers common, such as `mixing.mean()`.
      outer_optimizer: any optax transformation; its state exists once, for all workers. Its update
        is given `step`, the step of the run, for `scale_by_step`; a schedule inside it counts
        rounds.
      learning_rate: η, the learning rate of the workers, of which the mean over the round is taken;
        without it η = 1.
      optimizer_state, optimizer, model_state: as in `sync`.

    Returns:
      A stage of no steps, which needs the anchor.

    Raises:
      ConfigurationError: the mixer leaves workers different, so that there is no anchor.

    >>> import jaxlocal
    >>> outer_step(jaxlocal.mixing.mean(), optax.sgd(0.7, momentum=0.9)).anchored
    True
    """
    if learning_rate is not None:
        check_rate(learning_rate)
    check_common("an outer step", mixer)
    policy = StatePolicy(optimizer_state, optimizer, model_state)
    update = update_of(outer_optimizer, "outer optimizer")

    def init(state):
        return Memory(single=OuterMemory(init_of(outer_optimizer, state.anchor), state.step))

    def apply(state, memory, batches, context):
        outer_state, began = memory.single
        rate = _mean_rate(learning_rate, began, state.step)
        # Differences are averaged, not models: where workers have not moved they are exactly zero.
        average = mixer.average(jax.tree.map(moved, state.anchor, state.params), context)
        gradient = jax.tree.map(
            lambda y, d: (d[0, 0] / rate).astype(y.dtype), state.anchor, average
        )
        updates, outer_state = update(gradient, outer_state, state.anchor, step=state.step - 1)
        anchor = jax.tree.map(lambda y, u: (y + rate * u).astype(y.dtype), state.anchor, updates)
        params = broadcast_to_workers(jax.tree.map(lambda y: y[None, None], anchor), state.params)
        state = state._replace(params=params, anchor=anchor)
        memory = Memory(single=OuterMemory(outer_state, state.step))
        return policy.apply(state, mixer, context), memory, Info()

    def communication(state, number=0):
        models = Message(mixer, worker_shapes(state.params))
        return [models, *policy.messages(mixer, state)]

    return Stage(init, policy.of_average(apply, mixer), 0, communication, anchored=True)


def moved(anchor: Leaf, params: Leaf) -> Leaf:
    """y − x_i, with y rounded to the precision in which the worker started from it."""
    start = anchor.astype(params.dtype).astype(anchor.dtype)
    return start[None, None] - params.astype(anchor.dtype)


def _mean_rate(learning_rate, began, step):
    """The mean of η over the steps of a round."""
    if not callable(learning_rate):
        return 1.0 if learning_rate is None else max(learning_rate, _LEAST_RATE)
    add = lambda t, total: total + learning_rate(t)
    with lenient():
        total = lax.fori_loop(began, step, add, jnp.zeros_like(jnp.asarray(learning_rate(step))))
        return jnp.maximum(total / (step - began), _LEAST_RATE)
