"""Methods that compress messages with error reset: CSER and its special cases CSEA and CSER-PL.

What a message leaves out is applied at once on its own worker, and taken back in part at a reset.
The overall ratio R_C compares with data parallelism: 1 / (1/R_2 + 1/(R_1 H)), with a compressor of
ratio R_2 at every step and one of R_1 every H steps.
"""

import optax

from jaxlocal import periods
from jaxlocal.communication import mixing
from jaxlocal.errors import ConfigurationError, explain_arguments
from jaxlocal.parallel.keys import STEP_MESSAGE
from jaxlocal.stages.compose import sequence
from jaxlocal.stages.error_reset import error_reset, partial_average
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.local_step import local_step
from jaxlocal.stages.partial_sync import carried
from jaxlocal.stages.synced_updates import synced_updates
from jaxlocal.types import Compressor, Method, Period, Stage


@explain_arguments
def cser(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    gradient_compressor: Compressor | str,
    reset_compressor: Compressor | str,
    period: Period | int = 1,
    implementation: int | str = 1,
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """CSER, and M-CSER with any optimizer: errors are applied where they arise, and reset.

        every step:     c = Σ_j a_j C2(u_j);  x_i ← x_i + c + u_i − C2(u_i);  y ← y + c
        every H steps:  e_i = x_i − y;  y ← y + Σ_j a_j C1(e_j);  x_i ← y + e_i − C1(e_i)

    Symbols: u_i the update of worker i's optimizer (−η g_i in plain SGD), a_j the weight of a
    worker, y the anchor. x_i − e_i is the same on all workers, so that the anchor stands for K
    error buffers. Optimizer states are the workers' own throughout.

    Args:
      grad_fn: the gradient of one worker, as `gradients(loss)` makes it.
      optimizer: any optax transformation; every worker runs its own state of it.
      gradient_compressor: C2; `compression.identity()` makes this data parallelism, for optimizers
        linear in the gradient.
      reset_compressor: C1; with C1 = identity and C2 = zero this is Local SGD.
      period: H, or a rule for it.
      implementation: 1, as above, for any compressors. 2, for compressors that keep the same part
        of every worker's model (GRBS): after a whole local step x_i ← Σ_j a_j C2(x_j) + x_i −
        C2(x_i), and at the end of a round the same with C1. "released" is 2 as the authors' code
        has it: at the last step of a round the message of C1 takes the place of that of C2, so that
        R_C is H / ((H − 1)/R_2 + 1/R_1), and H at least 2. 2 and "released" have no anchor.
      model_state: "keep" or "average" model state such as batch statistics.
      worker_map: how a device runs its workers: "vmap", "map" or "blocks:N"; by default the
        fastest.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Raises:
      ConfigurationError: another implementation, compressors that do not fit the second one, or
        rounds of one step in the released one.

    Source: Xie, Zheng, Koyejo, Gupta, Li, Lin, "CSER: Communication-efficient SGD with Error
    Reset", NeurIPS 2020, https://arxiv.org/abs/2007.13221: Algorithm 2 and, with momentum,
    implementations I and II of M-CSER. Differs from the paper in: other optimizers, periods that
    change and unequal weights are possible.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> blocks = {"gradient_compressor": jaxlocal.compression.grbs(64)}
    >>> blocks |= {"reset_compressor": jaxlocal.compression.grbs(4)}
    >>> cser(grad_fn, optax.sgd(0.1, momentum=0.9), period=16, **blocks).outer.anchored
    True
    """
    build = {"1": _by_anchor, "2": _by_models, "released": _as_released}
    if str(implementation) not in build:
        raise ConfigurationError(
            f"M-CSER has the implementations {', '.join(build)}, got {implementation}"
        )
    rule = periods.of(period, optimizer)
    if implementation == "released" and rule.constant and rule.length(0, 2) == 1:
        raise ConfigurationError(
            "the released implementation of M-CSER sends the message of C1 in the place of that of "
            "C2, and with H = 1 none would be of C2; use csea, or H of at least 2"
        )
    inner, outer = build[str(implementation)](
        grad_fn, optimizer, gradient_compressor, reset_compressor, model_state, worker_map
    )
    return Method(inner, outer, optimizer, rule)


@explain_arguments
def csea(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    reset_compressor: Compressor | str,
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """CSEA, error assimilation: a whole local step, then a partial reset, at every step.

        every step:  x_i ← x_i + u_i;  e_i = x_i − y;  y ← y + Σ_j a_j C1(e_j);
                     x_i ← y + e_i − C1(e_i)

    It is `cser` with C2 = zero and H = 1.

    Args:
      grad_fn, optimizer, reset_compressor, model_state, worker_map: as in `cser`.

    Returns:
      A `Method`, to be given to `RoundFn`. Its rounds are one step long.

    Source: as `cser`.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> blocks = jaxlocal.compression.grbs(32)
    >>> csea(grad_fn, optax.sgd(0.1), reset_compressor=blocks).period.description
    'constant, H = 1'
    """
    return cser_pl(
        grad_fn,
        optimizer,
        reset_compressor=reset_compressor,
        model_state=model_state,
        worker_map=worker_map,
    )


@explain_arguments
def cser_pl(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    reset_compressor: Compressor | str,
    period: Period | int = 1,
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """CSER-PL, partial Local SGD: local steps, then a partial reset of what workers differ by.

        every step:     x_i ← x_i + u_i
        every H steps:  e_i = x_i − y;  y ← y + Σ_j a_j C1(e_j);  x_i ← y + e_i − C1(e_i)

    It is `cser` with C2 = zero: between resets no messages are sent.

    Args:
      grad_fn, optimizer, reset_compressor, model_state, worker_map: as in `cser`.
      period: H, or a rule for it.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Source: as `cser`.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> blocks = jaxlocal.compression.grbs(8)
    >>> cser_pl(grad_fn, optax.sgd(0.1), reset_compressor=blocks, period=4).outer.anchored
    True
    """
    step = local_step(grad_fn, optimizer, worker_map=worker_map)
    reset = error_reset(mixing.mean(), reset_compressor, model_state=model_state)
    return Method(step, reset, optimizer, periods.of(period, optimizer))


def _by_anchor(
    grad_fn, optimizer, gradient_compressor, reset_compressor, model_state, worker_map
) -> tuple[Stage, Stage]:
    """The stages of M-CSER I."""
    step = synced_updates(
        grad_fn, optimizer, mixing.mean(), gradient_compressor, worker_map=worker_map
    )
    return step, error_reset(mixing.mean(), reset_compressor, model_state=model_state)


def _by_models(
    grad_fn, optimizer, gradient_compressor, reset_compressor, model_state, worker_map
) -> tuple[Stage, Stage]:
    """The stages of M-CSER II."""
    _check_shared_masks(gradient_compressor, reset_compressor)
    step = local_step(grad_fn, optimizer, worker_map=worker_map)
    average = partial_average(mixing.mean(), gradient_compressor, purpose=STEP_MESSAGE)
    end = partial_average(mixing.mean(), reset_compressor, model_state=model_state)
    return sequence(step, average), end


def _as_released(grad_fn, optimizer, *others) -> tuple[Stage, Stage]:
    """The stages of M-CSER II as released: the end of a round takes its last step."""
    inner, end = _by_models(grad_fn, optimizer, *others)
    return inner, sequence(local_step(grad_fn, optimizer, worker_map=others[-1]), end)


def _check_shared_masks(*compressors: Compressor | str) -> None:
    for one in compressors:
        compressor = carried(mixing.mean(), one)
        if not compressor.shared_mask:
            raise ConfigurationError(
                f"implementation 2 of M-CSER averages the same part of all models, and what "
                f"{compressor.name} keeps differs from worker to worker; use grbs, random_k or "
                f"implementation 1"
            )
