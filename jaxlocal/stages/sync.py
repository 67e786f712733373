"""Average the models of the workers, with what else the workers hold."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxlocal.errors import ConfigurationError, lookup
from jaxlocal.parallel.collectives import broadcast_to_workers, vary, worker_shapes
from jaxlocal.parallel.layout import AXES
from jaxlocal.parallel.worker_maps import over_workers
from jaxlocal.types import Context, Info, Message, Mixer, Stage, TrainState

# The end of a round at which nobody says anything.
NOTHING = Stage(
    init=lambda state: (),
    apply=lambda state, memory, batches, context: (state, memory, Info()),
    steps=0,
    communication=lambda state, number=0: [],
)


OPTIMIZER_STATES = ("keep", "average", "reset")


MODEL_STATES = ("keep", "average")


def sync(
    mixer: Mixer,
    optimizer_state: str = "keep",
    optimizer: optax.GradientTransformation | None = None,
    model_state: str = "keep",
) -> Stage:
    """x_i ← Σ_j W_ji x_j for every worker; an anchor that exists moves along where the mixer makes
    all workers common. `feedback.sync_partly` says only a part of the models.

    Args:
      mixer: W.
      optimizer_state: "keep" every worker's own, "average" its floating-point values as the
        parameters are (which is said to others and counted), or "reset" it to that of a fresh
        optimizer. The count of `optax.scale_by_schedule`, by which `optax.sgd` and others follow a
        learning rate, survives a reset; that of `optax.inject_hyperparams` starts again.
      optimizer: needed for a reset.
      model_state: "keep" every worker's own (batch statistics, say), or "average" its
        floating-point values, which is said to others and counted.
    """
    others = Others(optimizer_state, optimizer, model_state)

    def apply(state, memory, batches, context):
        params = mixer.average(state.params, context)
        anchor = state.anchor
        if jax.tree.leaves(anchor) and set(mixer.axes) == set(AXES):
            anchor = jax.tree.map(lambda x, a: x[0, 0].astype(a.dtype), params, anchor)
        state = state._replace(params=broadcast_to_workers(params, state.params), anchor=anchor)
        return others.treat(state, mixer, context), memory, Info()

    def communication(state, number=0):
        return [Message(mixer, worker_shapes(state.params)), *others.said(mixer, state)]

    return Stage(lambda state: (), apply, 0, communication)


def sync_model_state(mixer: Mixer, model_state: str = "average") -> Stage:
    """Averages what models keep besides parameters, for methods whose parameters are alike."""
    others = Others("keep", None, model_state)
    if model_state == "keep":
        return NOTHING

    def apply(state, memory, batches, context):
        return others.treat(state, mixer, context), memory, Info()

    communication = lambda state, number=0: others.said(mixer, state)
    return Stage(lambda state: (), apply, 0, communication)


@dataclasses.dataclass(frozen=True)
class Others:
    """What a synchronisation does to the workers' state besides their parameters."""

    optimizer_state: str
    optimizer: optax.GradientTransformation | None
    model_state: str

    def __post_init__(self):
        lookup("optimizer state option", self.optimizer_state, dict.fromkeys(OPTIMIZER_STATES))
        lookup("model state option", self.model_state, dict.fromkeys(MODEL_STATES))
        if self.optimizer_state == "reset" and self.optimizer is None:
            raise ConfigurationError("a sync that resets optimizer states needs the optimizer")

    def treat(self, state: TrainState, mixer: Mixer, context: Context) -> TrainState:
        if self.optimizer_state == "average":
            state = state._replace(opt_state=_average(state.opt_state, mixer, context))
        elif self.optimizer_state == "reset":
            state = state._replace(opt_state=_reset(self.optimizer, state))
        if self.model_state == "average":
            state = state._replace(model_state=_average(state.model_state, mixer, context))
        return state

    def said(self, mixer: Mixer, state: TrainState) -> list[Message]:
        """What of it is said to others."""
        averaged = [state.opt_state] * (self.optimizer_state == "average")
        averaged += [state.model_state] * (self.model_state == "average")
        return [Message(mixer, worker_shapes(_floats(tree))) for tree in averaged]


def _floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def _average(tree, mixer, context):
    """The floating-point values averaged, the others every worker's own."""
    leaves, structure = jax.tree.flatten(tree)
    floats = _floats(leaves)
    averaged = iter(broadcast_to_workers(mixer.average(floats, context), floats))
    new = [next(averaged) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in leaves]
    return jax.tree.unflatten(structure, new)


def _reset(optimizer, state):
    def fresh(params, old):
        counts = lambda node: isinstance(node, optax.ScaleByScheduleState)
        return jax.tree.map(
            lambda new, old: old if counts(new) else new,
            vary(optimizer.init(params)),
            old,
            is_leaf=counts,
        )

    return over_workers(fresh, "vmap")(state.params, state.opt_state)
