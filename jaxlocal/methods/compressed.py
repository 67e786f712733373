"""Every named method whose workers say compressed messages, as the composition that it is.

Symbols as in `methods`; C is a compressor of `compression`, of nominal ratio R; g_i the gradient of
worker i and u_i the update that its own optimizer makes of it, −η g_i in plain SGD; e_i what its
messages have left out so far; y the anchor, a model that all workers know.

A compressor that leaves out much loses nothing for good: it is either said later (error feedback:
EF-SGD, QSparse, SparseLoCo) or applied at once where it arose and taken back at a reset (CSER). The
overall ratio R_C compares with data parallelism: it is R·H for methods that speak at the end of a
round, and 1 / (1/R_2 + 1/(R_1 H)) for CSER.
"""

import optax

from jaxlocal import compression, periods
from jaxlocal.communication import mixing
from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.keys import STEP_MESSAGE
from jaxlocal.stages.compose import sequence
from jaxlocal.stages.error_feedback import error_feedback
from jaxlocal.stages.error_reset import error_reset, partial_average
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.local_step import local_step
from jaxlocal.types import Compressor, Method, Period


def qsparse_local_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    compressor: Compressor,
    period: Period | int = 1,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    **options,
) -> Method:
    """QSparse-local-SGD: Local SGD whose workers say compressed differences, with error feedback.

        every step:     x_i ← x_i + u_i
        every H steps:  p_i = e_i + x_i − y;  y ← y + Σ_j a_j C(p_j);  e_i ← p_i − C(p_i);  x_i ← y

    Args:
      compressor: C; `compression.identity()` makes this Local SGD.
      period: H, or a rule for it.

    Source: Basu, Data, Karakus, Diggavi, "Qsparse-local-SGD: Distributed SGD with Quantization,
    Sparsification, and Local Computations", NeurIPS 2019, https://arxiv.org/abs/1906.02367.
    """
    state = (optimizer_state, optimizer, model_state)
    send = error_feedback(mixing.mean(), compressor, None, 1.0, None, *state)
    return Method(local_step(grad_fn, optimizer, **options), send, optimizer, periods.of(period))


def ef_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    compressor: Compressor,
    model_state: str = "keep",
    **options,
) -> Method:
    """EF-SGD: compressed updates at every step, what they leave out being added to the next.

        every step:  p_i = e_i + u_i;  x ← x + Σ_j a_j C(p_j);  e_i ← p_i − C(p_i)

    It is QSparse-local-SGD with H = 1. u_i is the update of the worker's own optimizer, momentum
    included.

    Source: Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD and other Gradient
    Compression Schemes", ICML 2019, https://arxiv.org/abs/1901.09847.
    """
    return qsparse_local_sgd(grad_fn, optimizer, compressor, 1, "keep", model_state, **options)


def cser(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    gradient_compressor: Compressor,
    reset_compressor: Compressor,
    period: Period | int = 1,
    implementation: int = 1,
    model_state: str = "keep",
    **options,
) -> Method:
    """CSER, with any optimizer inside M-CSER: errors are applied where they arise, and reset.

        every step:     c = Σ_j a_j C2(u_j);  x_i ← x_i + c + u_i − C2(u_i);  y ← y + c
        every H steps:  e_i = x_i − y;  y ← y + Σ_j a_j C1(e_j);  x_i ← y + e_i − C1(e_i)

    x_i − e_i is the same on all workers, so that one anchor y stands for K error buffers. Optimizer
    states are the workers' own throughout.

    Args:
      gradient_compressor: C2; `compression.identity()` makes this data parallelism, for optimizers
        linear in the gradient.
      reset_compressor: C1; with C1 = identity and C2 = zero this is Local SGD.
      period: H, or a rule for it.
      implementation: 1, as above, for any compressors; or 2, for compressors that keep the same of
        every worker's model (GRBS): after a whole step of its own, x_i ← Σ_j a_j C2(x_j) + x_i −
        C2(x_i), and at the end of a round the same with C1. It has neither errors nor anchor.

    Source: Xie, Zheng, Koyejo, Gupta, Li, Lin, "CSER: Communication-efficient SGD with Error
    Reset", NeurIPS 2020, https://arxiv.org/abs/2007.13221: Algorithm 2 and, with momentum,
    implementations I and II of M-CSER. Differs from the paper in: other optimizers, periods that
    change and unequal weights are as well.
    """
    rounds = {1: _by_anchor, 2: _by_models}
    if implementation not in rounds:
        raise ConfigurationError(f"M-CSER has the implementations 1 and 2, got {implementation}")
    inner, outer = rounds[implementation](
        grad_fn, optimizer, gradient_compressor, reset_compressor, model_state, options
    )
    return Method(inner, outer, optimizer, periods.of(period))


def _by_anchor(grad_fn, optimizer, gradient_compressor, reset_compressor, model_state, options):
    """The stages of M-CSER I."""
    inner = local_step(
        grad_fn,
        optimizer,
        update_mixer=mixing.mean(),
        compressor=gradient_compressor,
        **options,
    )
    return inner, error_reset(mixing.mean(), reset_compressor, model_state)


def _by_models(grad_fn, optimizer, gradient_compressor, reset_compressor, model_state, options):
    """The stages of M-CSER II."""
    for compressor in (gradient_compressor, reset_compressor):
        if not compressor.shared_mask:
            raise ConfigurationError(
                f"implementation 2 of M-CSER averages the same part of all models, and what "
                f"{compressor.name} keeps differs from worker to worker; use grbs, random_k or "
                f"implementation 1"
            )
    inner = local_step(grad_fn, optimizer, **options)
    average = partial_average(mixing.mean(), gradient_compressor, purpose=STEP_MESSAGE)
    return sequence(inner, average), partial_average(mixing.mean(), reset_compressor, model_state)


def csea(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    reset_compressor: Compressor,
    model_state: str = "keep",
    **options,
) -> Method:
    """CSEA, error assimilation: a whole step of one's own, then a partial reset at every step.

        every step:  x_i ← x_i + u_i;  e_i = x_i − y;  y ← y + Σ_j a_j C1(e_j);
                     x_i ← y + e_i − C1(e_i)

    It is CSER with C2 = zero and H = 1. Source: as `cser`.
    """
    return cser_pl(grad_fn, optimizer, reset_compressor, 1, model_state, **options)


def cser_pl(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    reset_compressor: Compressor,
    period: Period | int = 1,
    model_state: str = "keep",
    **options,
) -> Method:
    """CSER-PL, partial local SGD: local steps, then a partial reset of what workers differ by.

        every step:     x_i ← x_i + u_i
        every H steps:  e_i = x_i − y;  y ← y + Σ_j a_j C1(e_j);  x_i ← y + e_i − C1(e_i)

    It is CSER with C2 = zero: at a step nobody says anything. Source: as `cser`.

    Args:
      period: H, or a rule for it.
    """
    inner = local_step(grad_fn, optimizer, **options)
    reset = error_reset(mixing.mean(), reset_compressor, model_state)
    return Method(inner, reset, optimizer, periods.of(period))


def sparse_loco(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    compressor: Compressor | None = None,
    period: Period | int = 1,
    outer_optimizer: optax.GradientTransformation | None = None,
    error_decay: float = 0.95,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    **options,
) -> Method:
    """SparseLoCo: DiLoCo whose workers say the largest entries of their pseudo-gradients, with
    decayed error feedback.

        every step:     x_i ← x_i + u_i
        every H steps:  p_i = γ e_i + x_i − y;  e_i ← p_i − C(p_i);
                        y ← outer(y, −Σ_j a_j C(p_j));  x_i ← y

    Args:
      compressor: C; by default `compression.top_k(64)`, the 64th part of every chunk of 4,096.
      period: H, or a rule for it.
      outer_optimizer: by default `optax.sgd(1.0)`.
      error_decay: γ.

    Source: Sarfi, Thérien, Lidin, Belilovsky, "Communication Efficient LLM Pre-training with
    SparseLoCo", 2025, https://arxiv.org/abs/2508.15706; it quantises the kept values besides, as
    `compression.parse("top_k:64+qsgd:2")` does.
    """
    compressor = compressor or compression.top_k(64)
    outer = outer_optimizer or optax.sgd(1.0)
    state = (optimizer_state, optimizer, model_state)
    send = error_feedback(mixing.mean(), compressor, outer, error_decay, None, *state)
    return Method(local_step(grad_fn, optimizer, **options), send, optimizer, periods.of(period))
