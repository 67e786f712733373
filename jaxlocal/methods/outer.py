"""Methods with an outer optimizer on averages: SlowMo, DiLoCo and its streaming form."""

import numbers

import optax

from jaxlocal import periods
from jaxlocal.communication import mixing
from jaxlocal.errors import ConfigurationError, explain_arguments
from jaxlocal.methods.spec import OuterDefault, momentum_sgd, nesterov_sgd
from jaxlocal.stages.compose import in_turn, repeat, sequence
from jaxlocal.stages.fragments import Fragments, count_fragments
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.local_step import local_step
from jaxlocal.stages.outer_step import outer_step
from jaxlocal.stages.overlap import overlapped
from jaxlocal.types import Compressor, Method, Period

SLOWMO = OuterDefault("sgd", momentum_sgd, learning_rate=1.0, momentum=0.7)
DILOCO = OuterDefault("nesterov", nesterov_sgd, learning_rate=0.7, momentum=0.9)


@explain_arguments
def slowmo(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    period: Period | int = 1,
    outer_optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """SlowMo: Local SGD whose averages are smoothed by a slow momentum u.

        every step:     x_i ← optimizer_i(x_i, g_i)
        every H steps:  u ← β u + (y − Σ_j a_j x_j) / η;  y ← y − α η u;  x_i ← y

    Symbols: y the anchor, the model from which all workers started the round; α the slow learning
    rate and β the slow momentum.

    Args:
      grad_fn: the gradient of one worker, as `gradients(loss)` makes it.
      optimizer: any optax transformation; every worker runs its own state of it.
      learning_rate: η, which the optimizer follows; by default that of an optimizer made by
        `scheduled`.
      period: H, or a rule for it.
      outer_optimizer: makes −α u of the pseudo-gradient (y − Σ_j a_j x_j) / η; by default
        `optax.sgd(1.0, momentum=0.7)`, α = 1 and β = 0.7.
      optimizer_state: "reset", "keep" and "average" are the paper's three buffer strategies.
      model_state: "keep" or "average" model state such as batch statistics.
      worker_map: how a device runs its workers: "vmap", "map" or "blocks:N"; by default the
        fastest.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Raises:
      ConfigurationError: no learning rate is given, and the optimizer knows none.

    Source: Wang, Tantia, Ballas, Rabbat, "SlowMo: Improving Communication-Efficient Distributed SGD
    with Slow Momentum", ICLR 2020, https://arxiv.org/abs/1910.00643. Differs from the paper in: η
    may change inside a round, whose mean over the round is then used.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> slowmo(grad_fn, jaxlocal.scheduled(optax.sgd, 0.1), period=16).outer.anchored
    True
    """
    rate = getattr(optimizer, "learning_rate", None) if learning_rate is None else learning_rate
    if rate is None:
        raise ConfigurationError(
            "slowmo needs the learning rate of the workers: give learning_rate, or an optimizer "
            "made by jaxlocal.scheduled (a chain is scheduled as a whole)"
        )
    periods.check_schedule("slowmo was given", rate, optimizer)
    end = outer_step(
        mixing.mean(),
        SLOWMO.build() if outer_optimizer is None else outer_optimizer,
        learning_rate=rate,
        optimizer_state=optimizer_state,
        optimizer=optimizer,
        model_state=model_state,
    )
    step = local_step(grad_fn, optimizer, worker_map=worker_map)
    return Method(step, end, optimizer, periods.of(period, optimizer))


@explain_arguments
def diloco(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    period: Period | int = 1,
    outer_optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """DiLoCo: many local steps, then one step of an outer optimizer on the pseudo-gradient.

        every step:     x_i ← optimizer_i(x_i, g_i)
        every H steps:  d ← y − Σ_j a_j x_j;  y ← outer(y, d);  x_i ← y

    Symbols: y the anchor, the model from which all workers started the round; d the
    pseudo-gradient.

    Args:
      grad_fn: the gradient of one worker, as `gradients(loss)` makes it.
      optimizer: any optax transformation, AdamW in the paper; every worker runs its own state.
      period: H, or a rule for it; 500 in the paper.
      outer_optimizer: by default `optax.sgd(0.7, momentum=0.9, nesterov=True)`, the paper's. With
        `optax.sgd(1.0)` this is Local SGD.
      optimizer_state: at an average "keep", "average" or "reset" optimizer states, see
        `stages.sync`.
      model_state: "keep" or "average" model state such as batch statistics.
      worker_map: how a device runs its workers: "vmap", "map" or "blocks:N"; by default the
        fastest.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Source: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models",
    2023, https://arxiv.org/abs/2311.08105.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> diloco(grad_fn, optax.adamw(1e-3), period=500).outer.anchored
    True
    """
    end = outer_step(
        mixing.mean(),
        DILOCO.build() if outer_optimizer is None else outer_optimizer,
        optimizer_state=optimizer_state,
        optimizer=optimizer,
        model_state=model_state,
    )
    step = local_step(grad_fn, optimizer, worker_map=worker_map)
    return Method(step, end, optimizer, periods.of(period, optimizer))


@explain_arguments
def streaming_diloco(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    period: Period | int,
    outer_optimizer: optax.GradientTransformation | None = None,
    fragments: Fragments = 2,
    delay_steps: int = 1,
    mixing_factor: float = 0.5,
    compressor: Compressor | str | None = None,
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """Streaming DiLoCo: DiLoCo of one fragment of the model at a time, while local steps run.

        every step:       x_i ← optimizer_i(x_i, g_i)
        every H/P steps:  of the next fragment p of P, with the x_j of τ steps ago,
                          d ← y_p − Σ_j a_j x_jp;
                          y_p ← outer_p(y_p, d);  x_ip ← α x_ip + (1 − α) y_p

    Symbols: y the anchor, d the pseudo-gradient of a fragment. A round is H/P steps, the last τ of
    which run while d is averaged; see `stages.overlapped` for where a machine does both at once.
    The program of the end of a round contains the τ steps P times, so that its compilation takes P
    times as long.

    Args:
      grad_fn: the gradient of one worker, as `gradients(loss)` makes it.
      optimizer: any optax transformation; every worker runs its own state of it.
      period: H, the steps between two synchronisations of the same fragment, or a rule for it, in
        multiples of P.
      outer_optimizer: by default `optax.sgd(0.7, momentum=0.9, nesterov=True)`, DiLoCo's.
      fragments: P, over which `stages.fragments_of` spreads the tensors; or a regular expression of
        paths for each fragment, such as `["embed|layers/[01]/", ""]`.
      delay_steps: τ, less than H/P.
      mixing_factor: α, from 0 to 1; 0 discards what a fragment has learnt in the τ steps. With
        P = 1, τ = 0 and α = 0 this is DiLoCo.
      compressor: C, of the messages, with error feedback for each fragment. By default messages are
        sent uncompressed.
      model_state: "keep" or "average" model state such as batch statistics.
      worker_map: how a device runs its workers: "vmap", "map" or "blocks:N"; by default the
        fastest.

    Returns:
      A `Method`, to be given to `RoundFn`. Training ends on the synchronisation of one fragment;
      the others were synchronised some rounds before.

    Raises:
      ConfigurationError: a delay below 0, a factor that is not in [0, 1]; at `RoundFn.init`:
        fragments that do not fit the model.

    Source: Douillard et al., "Streaming DiLoCo with overlapping communication", 2025,
    https://arxiv.org/abs/2501.18512. Differs from the paper in: messages are quantised only where a
    compressor is given, and then with error feedback; and every message is received by the end of
    training, since it is sent τ steps before the end of a round.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> method = streaming_diloco(grad_fn, optax.adamw(1e-3), period=100, fragments=4)
    >>> list(jaxlocal.periods.lengths(method.period, 100)), method.outer.turns
    ([25, 25, 25, 25], 4)
    """
    if not isinstance(delay_steps, numbers.Integral) or delay_steps < 0:
        raise ConfigurationError(
            f"the delay must be an integer of at least 0 steps, got {delay_steps}"
        )
    parts = count_fragments(fragments)
    rounds = periods.of(periods.split(period, parts), optimizer)
    step = local_step(grad_fn, optimizer, worker_map=worker_map)
    outer = DILOCO.build() if outer_optimizer is None else outer_optimizer
    meanwhile = repeat(step, delay_steps) if delay_steps else sequence()
    turns = [
        overlapped(
            meanwhile,
            mixing.mean(),
            outer,
            mixing_factor=mixing_factor,
            fragment=fragment,
            fragments=fragments,
            compressor=compressor,
            model_state=model_state,
        )
        for fragment in range(parts)
    ]
    return Method(step, in_turn(*turns), optimizer, rounds)
