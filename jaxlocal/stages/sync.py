"""Average the models of the workers, and what else their state holds."""

import dataclasses
from collections.abc import Callable

import jax
import optax

from jaxlocal.communication.mixing import ByWeight
from jaxlocal.errors import ConfigurationError, lookup
from jaxlocal.parallel.collectives import broadcast_to_workers, vary, worker_shapes
from jaxlocal.parallel.keys import holds_key
from jaxlocal.parallel.layout import AXES
from jaxlocal.parallel.leaves import is_averaged
from jaxlocal.parallel.worker_maps import over_workers
from jaxlocal.stages.compose import NOTHING, OfAverage
from jaxlocal.stages.partial_sync import check_mixer
from jaxlocal.stages.updates import init_of
from jaxlocal.types import Context, Info, Message, Mixer, Stage, TrainState, Tree

OPTIMIZER_STATES = ("keep", "average", "reset")
MODEL_STATES = ("keep", "average")


def sync(
    mixer: Mixer,
    *,
    optimizer_state: str = "keep",
    optimizer: optax.GradientTransformation | None = None,
    model_state: str = "keep",
) -> Stage:
    """Average the models of the workers by a mixer: x_i ← Σ_j W_ji x_j.

    An anchor that exists moves to the average where the mixer makes all workers common.
    `partial_average` averages a part of the models only.

    Args:
      mixer: W.
      optimizer_state: what happens to the workers' optimizer states. "keep" leaves each worker its
        own; "average" averages their floating-point values like the parameters, which is sent and
        counted; "reset" makes them those of a fresh optimizer. Random keys and the count of
        `optax.scale_by_schedule`, by which `optax.sgd` and others follow a learning rate, survive
        a reset; the count of `optax.inject_hyperparams` starts again.
      optimizer: the optimizer of the workers, needed for a reset.
      model_state: what happens to model state such as batch statistics. "keep" leaves each worker
        its own; "average" averages its floating-point values, which is sent and counted.

    Returns:
      A stage of no steps.

    Raises:
      ConfigurationError: an unknown option, or a reset without the optimizer.

    >>> import jaxlocal
    >>> sync(jaxlocal.mixing.mean(), model_state="average").steps
    0
    """
    check_mixer(mixer)
    policy = StatePolicy(optimizer_state, optimizer, model_state)

    def apply(state, memory, batches, context):
        params = mixer.average(state.params, context)
        anchor = state.anchor
        if jax.tree.leaves(anchor) and set(mixer.axes) == set(AXES):
            anchor = jax.tree.map(lambda x, a: x[0, 0].astype(a.dtype), params, anchor)
        params = broadcast_to_workers(params, state.params)
        state = state._replace(params=params, anchor=anchor)
        return policy.apply(state, mixer, context), memory, Info()

    def communication(state, number=0):
        models = Message(mixer, worker_shapes(state.params))
        return [models, *policy.messages(mixer, state)]

    marked = policy.of_average(apply, mixer)
    return Stage(lambda state: (), marked, 0, communication)


def sync_model_state(mixer: Mixer, *, model_state: str = "average") -> Stage:
    """Average only the model state of the workers, for methods whose parameters are common.

    Args:
      mixer: W.
      model_state: "average", or "keep", which does nothing.

    >>> import jaxlocal
    >>> sync_model_state(jaxlocal.mixing.mean()).steps
    0
    """
    check_mixer(mixer)
    policy = StatePolicy("keep", None, model_state)
    if model_state == "keep":
        return NOTHING

    def apply(state, memory, batches, context):
        return policy.apply(state, mixer, context), memory, Info()

    communication = lambda state, number=0: policy.messages(mixer, state)
    return Stage(lambda state: (), apply, 0, communication)


@dataclasses.dataclass(frozen=True)
class StatePolicy:
    """What a synchronisation does to the optimizer and model states of the workers."""

    optimizer_state: str
    optimizer: optax.GradientTransformation | None
    model_state: str

    def __post_init__(self):
        lookup("optimizer state option", self.optimizer_state, dict.fromkeys(OPTIMIZER_STATES))
        lookup("model state option", self.model_state, dict.fromkeys(MODEL_STATES))
        if self.optimizer_state == "reset" and self.optimizer is None:
            raise ConfigurationError("a sync that resets optimizer states needs the optimizer")

    def apply(self, state: TrainState, mixer: Mixer, context: Context) -> TrainState:
        """The state after the synchronisation."""
        if self.optimizer_state == "average":
            state = state._replace(opt_state=_average(state.opt_state, mixer, context))
        elif self.optimizer_state == "reset":
            state = state._replace(opt_state=_reset(self.optimizer, state))
        if self.model_state == "average":
            state = state._replace(model_state=_average(state.model_state, mixer, context))
        return state

    def of_average(self, apply: Callable, mixer: Mixer) -> Callable:
        """The `apply` of a stage, marked where it needs no more than the average by weight."""
        by_weight = isinstance(mixer.average, ByWeight)
        return OfAverage(apply, self._common) if by_weight else apply

    def _common(self, state: TrainState) -> tuple[Tree, Tree, Tree]:
        """What is the same on all workers after it, if their parameters are; see `OfAverage`."""
        every = lambda value, tree: jax.tree.map(lambda _: value, tree)
        averaged = lambda option, tree: jax.tree.map(
            lambda x: option == "average" and is_averaged(x), tree
        )
        opt_state = averaged(self.optimizer_state, state.opt_state)
        if self.optimizer_state == "reset":
            opt_state = jax.tree.map(
                lambda x: every(False, x) if _counts(x) else not holds_key(x, 2),
                state.opt_state,
                is_leaf=_counts,
            )
        return every(True, state.params), opt_state, averaged(self.model_state, state.model_state)

    def messages(self, mixer: Mixer, state: TrainState) -> list[Message]:
        """The messages by which it is averaged."""
        averaged = [state.opt_state] * (self.optimizer_state == "average")
        averaged += [state.model_state] * (self.model_state == "average")
        return [Message(mixer, worker_shapes(_floats(tree))) for tree in averaged]


def _counts(node):
    """Whether it counts steps for a learning rate, which goes on after a reset."""
    return isinstance(node, optax.ScaleByScheduleState)


def _floats(tree):
    return [x for x in jax.tree.leaves(tree) if is_averaged(x)]


def _average(tree, mixer, context):
    """Average the floating-point values; every worker keeps its other values."""
    leaves, structure = jax.tree.flatten(tree)
    floats = _floats(leaves)
    averaged = iter(broadcast_to_workers(mixer.average(floats, context), floats))
    new = [next(averaged) if is_averaged(x) else x for x in leaves]
    return jax.tree.unflatten(structure, new)


def _reset(optimizer, state):
    def fresh(params, old):
        return jax.tree.map(
            lambda new, old: old if _counts(new) or holds_key(new) else new,
            vary(init_of(optimizer, params)),
            old,
            is_leaf=_counts,
        )

    return over_workers(fresh, "vmap")(state.params, state.opt_state)
