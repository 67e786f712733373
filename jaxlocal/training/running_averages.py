"""Running averages of the model over the steps of a run: EMA and stochastic weight averaging (SWA).

Workers train as they would without. The averages are in the state, so that checkpoints hold them.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlocal.errors import ConfigurationError, check_integer, lookup
from jaxlocal.parallel.leaves import wide
from jaxlocal.stages.averaged_workers import parts_of
from jaxlocal.stages.compose import NOTHING, OfAverage, sequence
from jaxlocal.training.common_state import held, held_as
from jaxlocal.types import Info, Memory, Method, Stage, TrainState


class RunningAverages(NamedTuple):
    """What `with_running_averages` keeps in the memory of a state."""

    kept: Memory  # stacked: every worker's averages by name; single: int32 [], their step


@dataclasses.dataclass(frozen=True)
class RunningAverage:
    """An average m of the models x at the ends of rounds, each weighted by the steps of its round.

        m ← m + w (x − m),   w = (1 − β^h) / (1 − β^t),   or h / t if β = 1

    Symbols: β the decay of one step, t the steps since `start`, h those of the round that ends (of
    a round that begins before `start`, those after it). So a round of H steps counts as H rounds of
    one step with the same model, and methods with different H are averaged over the same time.
    Until `start`, m is the model.

    Args:
      decay: β in (0, 1] of a step. Below 1 the average is an exponential moving average (EMA) over
        about 1 / (1 − β) steps, with the bias correction of Adam: the initial model has no weight.
        At 1, the default, all steps count the same: that is stochastic weight averaging (SWA), and
        from step 0 on Polyak-Ruppert averaging.
      start: the step after which models count.

    Raises:
      ConfigurationError: the decay is not in (0, 1], or the start is not an integer ≥ 0.

    Sources: P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
    Generalization", UAI 2018, https://arxiv.org/abs/1803.05407 (SWA); B. T. Polyak and A. B.
    Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control and
    Optimization 30 (1992), https://doi.org/10.1137/0330046. Differs from the papers in: models
    are taken at the ends of rounds, at any learning rate; that of SWA is cyclical or constant.

    >>> RunningAverage(decay=0.5).share(jnp.int32(4), jnp.int32(6)).round(4)  # (1 − ¼) / (1 − 2⁻⁶)
    Array(0.7619, dtype=float32)
    """

    decay: float = 1.0
    start: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ConfigurationError(
                f"the decay of a running average must be in (0, 1], got {self.decay}"
            )
        check_integer("the start of a running average", self.start, least=0)

    def share(self, before: jax.Array, now: jax.Array) -> jax.Array:
        """The share w of the newest model in the average, where a round took steps before … now."""
        real = lambda steps: jnp.maximum(steps, 1).astype(jnp.result_type(float))
        counted = now - self.start
        ratio = self._weight(real(jnp.minimum(now - before, counted))) / self._weight(real(counted))
        return jnp.where(counted > 0, ratio, 1)

    def _weight(self, steps: jax.Array) -> jax.Array:
        """1 + β + … + β^(steps − 1), up to a factor."""
        return steps if self.decay == 1 else -jnp.expm1(steps * math.log(self.decay))


def with_running_averages(method: Method, **averages: RunningAverage) -> Method:
    """Keep running averages of the model, by name: EMA, SWA or any other `RunningAverage`.

    At the end of every round (in methods at whose ends of rounds nothing is done, as in data
    parallelism, after every step) each worker averages its own model x_i into m_i. The average is
    linear, so that Σ_i a_i m_i is the running average of the average model u = Σ_i a_i x_i: nothing
    is sent, and the models that train are the same as without. It costs one pass over the
    parameters a round, and for each average the memory of another model per worker, in float32
    where parameters have half precision.

    Args:
      method: any method, built in or your own.
      averages: by the names under which `running_average` finds them.

    Returns:
      The method with these averages, to be given to `RoundFn`.

    Raises:
      ConfigurationError: the method is no `Method`, or one of the averages no `RunningAverage`.

    >>> import jaxlocal, numpy as np, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.25), period=2)
    >>> swa, ema = RunningAverage(start=2), RunningAverage(decay=0.5)
    >>> method = with_running_averages(method, swa=swa, ema=ema)
    >>> round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
    >>> state, models = round_fn.init(np.float32(0), jax.random.key(0)), []
    >>> for _ in range(3):
    ...     state, _ = round_fn(state, np.ones((2, 1, 2), np.float32))
    ...     models.append(float(state.params[0, 0]))
    >>> models
    [0.75, 0.9375, 0.984375]
    >>> running_average(state, "swa").params  # (0.9375 + 0.984375) / 2
    Array([[0.9609375, 0.9609375]], dtype=float32)
    """
    if not isinstance(method, Method):
        raise ConfigurationError(f"running averages are of a Method, got {type(method).__name__}")
    for name, average in averages.items():
        if not isinstance(average, RunningAverage):
            raise ConfigurationError(f"{name} must be a RunningAverage, got {average!r}")
    if not averages:
        return method
    stage = _averaging(averages)
    if method.outer is NOTHING:  # a round then may end at any step
        return method._replace(inner=sequence(method.inner, stage))
    return method._replace(outer=sequence(method.outer, stage))


def running_average(state: TrainState, name: str) -> TrainState:
    """The state with a running average in place of its parameters, for evaluations and exports.

    `evaluation(running_average(state, "ema"))` evaluates it, `round_fn.mean(…)` gives its
    parameters. The model state is that of the workers' models: batch statistics have to be
    estimated on the average by `Reestimation`.

    Args:
      state: of a method that `with_running_averages` made.
      name: of the average.

    Raises:
      ConfigurationError: the state has no average of this name.
    """
    is_kept, rows = lambda node: isinstance(node, RunningAverages), held(state)
    nodes = filter(is_kept, jax.tree.leaves(rows.memory, is_leaf=is_kept))
    found = {own: models for node in nodes for own, models in node.kept.stacked.items()}
    models = lookup("running average of this state", name, found)
    params = jax.tree.map(lambda m, x: m.astype(x.dtype), models, rows.params)
    return held_as(state, rows._replace(params=params))


def _averaging(averages: dict[str, RunningAverage]) -> Stage:
    """The stage of no steps, and without messages, that averages the models of the workers."""

    def init(state):
        models = jax.tree.map(lambda x: x.astype(wide(x.dtype)), state.params)
        return RunningAverages(Memory(dict.fromkeys(averages, models), jnp.int32(0)))

    def apply(state, memory, batches, context):
        moved = {}
        for name, models in memory.kept.stacked.items():
            share = averages[name].share(memory.kept.single, state.step)
            move = lambda m, x, w=share: m + w.astype(m.dtype) * (x.astype(m.dtype) - m)
            moved[name] = jax.tree.map(move, models, state.params)
        return state, RunningAverages(Memory(moved, state.step)), Info()

    nothing = lambda state: jax.tree.map(lambda _: False, parts_of(state))
    return Stage(init, OfAverage(apply, nothing), 0, lambda state, number=0: [])
