"""Methods that compress messages with error feedback: EF-SGD, QSparse-local-SGD, SparseLoCo.

What a message leaves out is added to the next one. The overall ratio R_C compares with data
parallelism: R·H for a compressor of ratio R and a message every H steps.
"""

import optax

from jaxlocal import compression, periods
from jaxlocal.communication import mixing
from jaxlocal.errors import explain_arguments
from jaxlocal.methods.spec import OuterDefault, momentum_sgd
from jaxlocal.stages.compose import sequence
from jaxlocal.stages.error_feedback import common_decay, error_feedback
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.local_step import local_step
from jaxlocal.types import Compressor, Method, Period

SPARSE_LOCO = OuterDefault("sgd", momentum_sgd, learning_rate=1.0, momentum=0.0)


@explain_arguments
def qsparse_local_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    compressor: Compressor | str,
    period: Period | int = 1,
    decay_optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """QSparse-local-SGD: Local SGD with compressed differences of models and error feedback.

        every step:     x_i ← x_i + u_i
        every H steps:  p_i = e_i + x_i − y;  y ← y + Σ_j a_j C(p_j);  e_i ← p_i − C(p_i);  x_i ← y

    Symbols: u_i the update of worker i's optimizer (−η g_i in plain SGD), e_i what its messages
    have left out so far, y the anchor, a_j the weight of a worker. With a decay optimizer also
    y ← y + d and x_i ← x_i + d at every step, where d is its update at y on gradients of zero.

    Args:
      grad_fn: the gradient of one worker, as `gradients(loss)` makes it.
      optimizer: any optax transformation; every worker runs its own state of it.
      compressor: C; `compression.identity()` makes this Local SGD.
      period: H, or a rule for it.
      decay_optimizer: keeps weight decay outside the compressor, with momentum of its own, as in
        `optax.chain(optax.add_decayed_weights(5e-4), optax.trace(0.9), optax.scale(-0.1))`; the
        optimizer then has none. By default decay is a part of u_i, goes through C with the rest,
        and what C leaves of it arrives late.
      optimizer_state: at an average "keep", "average" or "reset" optimizer states, see
        `stages.sync`.
      model_state: "keep" or "average" model state such as batch statistics.
      worker_map: how a device runs its workers: "vmap", "map" or "blocks:N"; by default the
        fastest.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Source: Basu, Data, Karakus, Diggavi, "Qsparse-local-SGD: Distributed SGD with Quantization,
    Sparsification, and Local Computations", NeurIPS 2019, https://arxiv.org/abs/1906.02367.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> top_k = jaxlocal.compression.top_k(32)
    >>> qsparse_local_sgd(grad_fn, optax.sgd(0.1), compressor=top_k, period=8).outer.anchored
    True
    """
    send = error_feedback(
        mixing.mean(),
        compressor,
        optimizer_state=optimizer_state,
        optimizer=optimizer,
        model_state=model_state,
    )
    step = local_step(grad_fn, optimizer, worker_map=worker_map)
    if decay_optimizer is not None:
        step = sequence(step, common_decay(decay_optimizer))
    return Method(step, send, optimizer, periods.of(period, optimizer))


@explain_arguments
def ef_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    compressor: Compressor | str,
    decay_optimizer: optax.GradientTransformation | None = None,
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """EF-SGD: compressed updates at every step, with error feedback.

        every step:  p_i = e_i + u_i;  x ← x + Σ_j a_j C(p_j);  e_i ← p_i − C(p_i)

    It is `qsparse_local_sgd` with H = 1. u_i is the update of the worker's own optimizer, momentum
    included. A decay optimizer, as the released code of CSER has one here, moves x by its update on
    gradients of zero.

    Args:
      grad_fn, optimizer, compressor, decay_optimizer, model_state, worker_map: as in
        `qsparse_local_sgd`.

    Returns:
      A `Method`, to be given to `RoundFn`. Its rounds are one step long.

    Source: Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD and other Gradient
    Compression Schemes", ICML 2019, https://arxiv.org/abs/1901.09847.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> sign = jaxlocal.compression.sign()
    >>> ef_sgd(grad_fn, optax.sgd(0.1), compressor=sign).period.description
    'constant, H = 1'
    """
    return qsparse_local_sgd(
        grad_fn,
        optimizer,
        compressor=compressor,
        decay_optimizer=decay_optimizer,
        model_state=model_state,
        worker_map=worker_map,
    )


@explain_arguments
def sparse_loco(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    compressor: Compressor | str | None = None,
    period: Period | int = 1,
    outer_optimizer: optax.GradientTransformation | None = None,
    error_decay: float = 0.95,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """SparseLoCo: DiLoCo with the largest entries of pseudo-gradients and decayed error feedback.

        every step:     x_i ← x_i + u_i
        every H steps:  p_i = γ e_i + x_i − y;  e_i ← p_i − C(p_i);
                        y ← outer(y, −Σ_j a_j C(p_j));  x_i ← y

    Symbols as in `qsparse_local_sgd`. The paper also quantises the kept values to 2 bits:
    `compression.parse("top_k:64+two_bit")` is that compressor as its authors released it. It is
    close to `+sign`: of the largest Gaussian values both lose 1.2 % of the squared norm, where
    `+qsgd:2` loses 87 %.

    Args:
      grad_fn: the gradient of one worker, as `gradients(loss)` makes it.
      optimizer: any optax transformation, AdamW in the paper; every worker runs its own state.
      compressor: C; by default `compression.top_k(64)`, the 64th part of every chunk of 4,096,
        uncoded.
      period: H, or a rule for it.
      outer_optimizer: by default `optax.sgd(1.0)`.
      error_decay: γ, in [0, 1].
      optimizer_state: at an average "keep", "average" or "reset" optimizer states, see
        `stages.sync`.
      model_state: "keep" or "average" model state such as batch statistics.
      worker_map: how a device runs its workers: "vmap", "map" or "blocks:N"; by default the
        fastest.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Source: Sarfi, Thérien, Lidin, Belilovsky, "Communication Efficient LLM Pre-training with
    SparseLoCo", 2025, https://arxiv.org/abs/2508.15706.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> sparse_loco(grad_fn, optax.adamw(1e-3), period=15).outer.anchored
    True
    """
    send = error_feedback(
        mixing.mean(),
        compression.top_k(64) if compressor is None else compressor,
        outer_optimizer=SPARSE_LOCO.build() if outer_optimizer is None else outer_optimizer,
        error_decay=error_decay,
        optimizer_state=optimizer_state,
        optimizer=optimizer,
        model_state=model_state,
    )
    step = local_step(grad_fn, optimizer, worker_map=worker_map)
    return Method(step, send, optimizer, periods.of(period, optimizer))
