"""What ends a round: stages that take no ticks and make workers alike."""

import jax
import jax.numpy as jnp
import optax

from jaxlocal.errors import ConfigurationError, lookup
from jaxlocal.local import bits
from jaxlocal.types import Info, Messages, Mixer, Stage
from jaxlocal.workers import AXES, over_workers, spread, vary

# The end of a round at which nobody says anything.
NOTHING = Stage(
    init=lambda state: (),
    apply=lambda state, memory, batches, world: (state, memory, Info()),
    ticks=0,
    traffic=lambda state, layout: Messages(),
)

OPTIMIZER_STATES = ("keep", "average", "reset")


def sync(
    mixer: Mixer,
    optimizer_state: str = "keep",
    optimizer: optax.GradientTransformation | None = None,
) -> Stage:
    """x_i ← Σ_j W_ji x_j for every worker; an anchor that exists moves along where the mixer makes
    all workers common.

    Args:
      mixer: W.
      optimizer_state: "keep" every worker's own, "average" its floating-point values as the
        parameters are (which is said to others and counted), or "reset" it to that of a fresh
        optimizer. The count of `optax.scale_by_schedule`, by which `optax.sgd` and others follow a
        learning rate, survives a reset; that of `optax.inject_hyperparams` starts again.
      optimizer: needed for a reset.
    """
    treat = lookup(
        "optimizer state option",
        optimizer_state,
        dict(zip(OPTIMIZER_STATES, (_keep, _average, _reset), strict=True)),
    )

    if optimizer_state == "reset" and optimizer is None:
        raise ConfigurationError("a sync that resets optimizer states needs the optimizer")

    def apply(state, memory, batches, world):
        params = mixer.average(state.params, world)
        anchor = state.anchor
        if jax.tree.leaves(anchor) and set(mixer.axes) == set(AXES):
            anchor = jax.tree.map(lambda x, a: x[0, 0].astype(a.dtype), params, anchor)
        state = state._replace(params=spread(params, state.params), anchor=anchor)
        return state._replace(opt_state=treat(state, mixer, optimizer, world)), memory, Info()

    def traffic(state, layout):
        said = mixer.messages(bits(state.params), layout)
        if optimizer_state == "average":
            said = said.plus(mixer.messages(bits(_floats(state.opt_state)), layout))
        return said

    return Stage(lambda state: (), apply, 0, traffic)


def _keep(state, mixer, optimizer, world):
    return state.opt_state


def _floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def _average(state, mixer, optimizer, world):
    leaves, structure = jax.tree.flatten(state.opt_state)
    floats = _floats(leaves)
    averaged = iter(spread(mixer.average(floats, world), floats))
    new = [next(averaged) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in leaves]
    return jax.tree.unflatten(structure, new)


def _reset(state, mixer, optimizer, world):
    def fresh(params, old):
        counts = lambda node: isinstance(node, optax.ScaleByScheduleState)
        return jax.tree.map(
            lambda new, old: old if counts(new) else new,
            vary(optimizer.init(params)),
            old,
            is_leaf=counts,
        )

    return over_workers(fresh, "vmap")(state.params, state.opt_state)
