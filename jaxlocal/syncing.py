"""What ends a round: stages that take no ticks and make workers alike."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxlocal.errors import ConfigurationError, lookup
from jaxlocal.exchange import check_common
from jaxlocal.types import Info, Memory, Mixer, Said, Stage, TrainState, World
from jaxlocal.worker_maps import over_workers
from jaxlocal.workers import AXES, one_worker, spread, vary

# The end of a round at which nobody says anything.
NOTHING = Stage(
    init=lambda state: (),
    apply=lambda state, memory, batches, world: (state, memory, Info()),
    ticks=0,
    says=lambda state, number=0: [],
)

OPTIMIZER_STATES = ("keep", "average", "reset")
MODEL_STATES = ("keep", "average")
# The least learning rate that a pseudo-gradient is divided by.
_LEAST_RATE = 1e-12


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

    def apply(state, memory, batches, world):
        params = mixer.average(state.params, world)
        anchor = state.anchor
        if jax.tree.leaves(anchor) and set(mixer.axes) == set(AXES):
            anchor = jax.tree.map(lambda x, a: x[0, 0].astype(a.dtype), params, anchor)
        state = state._replace(params=spread(params, state.params), anchor=anchor)
        return others.treat(state, mixer, world), memory, Info()

    def says(state, number=0):
        return [Said(mixer, one_worker(state.params)), *others.said(mixer, state)]

    return Stage(lambda state: (), apply, 0, says)


def outer_step(
    mixer: Mixer,
    outer_optimizer: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule | None = None,
    optimizer_state: str = "keep",
    optimizer: optax.GradientTransformation | None = None,
    model_state: str = "keep",
) -> Stage:
    """The anchor y takes an optimizer step on the pseudo-gradient, and all workers restart from it.

        d ← Σ a_i (y − x_i) / η;  y ← y + η · outer(d);  x_i ← y

    Args:
      mixer: one that makes all workers common.
      outer_optimizer: any optax transformation; its state exists once, for all workers. It is told
        the run's tick, for `scale_by_tick`; a schedule of its own counts rounds.
      learning_rate: η, the workers' own, of which the mean over the round is taken; without it,
        η = 1.
      optimizer_state, optimizer, model_state: what happens to the workers' own, as in `sync`.

    Raises:
      ConfigurationError: the mixer leaves workers unlike, so that there is no anchor.
    """
    check_common("an outer step", mixer)
    others = Others(optimizer_state, optimizer, model_state)
    update = optax.with_extra_args_support(outer_optimizer).update

    def init(state):
        return Memory(single=(outer_optimizer.init(state.anchor), state.tick))

    def apply(state, memory, batches, world):
        outer_state, began = memory.single
        rate = _mean_rate(learning_rate, began, state.tick)
        # Differences are averaged, not models: where workers have not moved they are exactly zero.
        average = mixer.average(jax.tree.map(moved, state.anchor, state.params), world)
        gradient = jax.tree.map(
            lambda y, d: (d[0, 0] / rate).astype(y.dtype), state.anchor, average
        )
        updates, outer_state = update(gradient, outer_state, state.anchor, tick=state.tick - 1)
        anchor = jax.tree.map(lambda y, u: (y + rate * u).astype(y.dtype), state.anchor, updates)
        params = spread(jax.tree.map(lambda y: y[None, None], anchor), state.params)
        state = state._replace(params=params, anchor=anchor)
        memory = Memory(single=(outer_state, state.tick))
        return others.treat(state, mixer, world), memory, Info()

    def says(state, number=0):
        return [Said(mixer, one_worker(state.params)), *others.said(mixer, state)]

    return Stage(init, apply, 0, says, anchored=True)


def sync_model_state(mixer: Mixer, model_state: str = "average") -> Stage:
    """Averages what models keep besides parameters, for methods whose parameters are alike."""
    others = Others("keep", None, model_state)
    if model_state == "keep":
        return NOTHING

    def apply(state, memory, batches, world):
        return others.treat(state, mixer, world), memory, Info()

    says = lambda state, number=0: others.said(mixer, state)
    return Stage(lambda state: (), apply, 0, says)


def moved(anchor, params):
    """y − x_i, from where a worker began, which is y in its own precision."""
    return anchor.astype(params.dtype).astype(anchor.dtype) - params.astype(anchor.dtype)


def _mean_rate(learning_rate, began, tick):
    """The mean of η over the ticks of a round."""
    if not callable(learning_rate):
        return 1.0 if learning_rate is None else learning_rate
    add = lambda t, total: total + learning_rate(t)
    total = lax.fori_loop(began, tick, add, jnp.zeros_like(jnp.asarray(learning_rate(tick))))
    return jnp.maximum(total / (tick - began), _LEAST_RATE)


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

    def treat(self, state: TrainState, mixer: Mixer, world: World) -> TrainState:
        if self.optimizer_state == "average":
            state = state._replace(opt_state=_average(state.opt_state, mixer, world))
        elif self.optimizer_state == "reset":
            state = state._replace(opt_state=_reset(self.optimizer, state))
        if self.model_state == "average":
            state = state._replace(model_state=_average(state.model_state, mixer, world))
        return state

    def said(self, mixer: Mixer, state: TrainState) -> list[Said]:
        """What of it is said to others."""
        averaged = [state.opt_state] * (self.optimizer_state == "average")
        averaged += [state.model_state] * (self.model_state == "average")
        return [Said(mixer, one_worker(_floats(tree))) for tree in averaged]


def _floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def _average(tree, mixer, world):
    """The floating-point values averaged, the others every worker's own."""
    leaves, structure = jax.tree.flatten(tree)
    floats = _floats(leaves)
    averaged = iter(spread(mixer.average(floats, world), floats))
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
