"""Methods that average gradients or models: data parallelism, Local SGD and its schedules."""

import optax

from jaxlocal import periods
from jaxlocal.communication import mixing
from jaxlocal.errors import explain_arguments
from jaxlocal.stages.averaged_gradients import averaged_gradients
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.local_step import local_step
from jaxlocal.stages.sync import sync, sync_model_state
from jaxlocal.types import Compressor, Method, Period


@explain_arguments
def data_parallel(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    compressor: Compressor | str | None = None,
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """Data parallelism: average the gradients of all workers at every step, before the optimizer.

        every step:  g ← Σ_i a_i C(g_i);  x ← optimizer(x, g), the same on every worker

    Symbols: x_i the model of worker i, g_i its gradient, a_i its weight in the average.

    Args:
      grad_fn: the gradient of one worker, as `gradients(loss)` makes it.
      optimizer: any optax transformation; every worker runs its own state of it.
      compressor: C, without feedback of what it leaves out, as in QSGD. A compressor that shrinks
        the mean gradient (to 1 / (1 + ω) with `compression.qsgd`, to the kept part with `grbs` and
        `random_k`) shrinks SGD's steps by the same factor. By default gradients are sent
        uncompressed.
      model_state: "keep" or "average" model state such as batch statistics, see `stages.sync`.
      worker_map: how a device runs its workers: "vmap", "map" or "blocks:N"; by default the
        fastest.

    Returns:
      A `Method`, to be given to `RoundFn`. Its rounds are one step long.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> data_parallel(grad_fn, optax.sgd(0.1)).period.description
    'constant, H = 1'
    """
    step = averaged_gradients(
        grad_fn, optimizer, mixing.mean(), compressor=compressor, worker_map=worker_map
    )
    end = sync_model_state(mixing.mean(), model_state=model_state)
    return Method(step, end, optimizer, periods.constant(1))


@explain_arguments
def local_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    period: Period | int = 1,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """Local SGD, and Local OPT with any optimizer: H local steps, then the average of the models.

        every step:     x_i ← optimizer_i(x_i, g_i)
        every H steps:  x_i ← Σ_j a_j x_j

    Symbols: x_i the model of worker i, g_i its gradient, a_i its weight in the average.

    Args:
      grad_fn: the gradient of one worker, as `gradients(loss)` makes it.
      optimizer: any optax transformation; every worker runs its own state of it.
      period: H, or a rule for it: `periods.qsr` makes this the Quadratic Synchronization Rule.
      optimizer_state: at an average "keep" each worker's own, "average" or "reset" the optimizer
        states, see `stages.sync`.
      model_state: "keep" or "average" model state such as batch statistics.
      worker_map: how a device runs its workers: "vmap", "map" or "blocks:N"; by default the
        fastest.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Source: Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019,
    https://arxiv.org/abs/1805.09767; Gu et al., ICLR 2024, https://arxiv.org/abs/2310.14423.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> local_sgd(grad_fn, optax.adamw(1e-3), period=8).period.description
    'constant, H = 8'
    """
    step = local_step(grad_fn, optimizer, worker_map=worker_map)
    average = sync(
        mixing.mean(),
        optimizer_state=optimizer_state,
        optimizer=optimizer,
        model_state=model_state,
    )
    return Method(step, average, optimizer, periods.of(period, optimizer))


@explain_arguments
def post_local_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    switch_step: int,
    local_steps: int,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """Post-local SGD: Local SGD with H = 1 until a step, then with H = `local_steps`.

    Until the switch models are averaged after every step, each worker having stepped on its own
    gradient. For SGD, momentum included, that is data parallelism; for Adam and other optimizers
    that are not linear in the gradient it is not. For data parallelism first, as PyTorch has it,
    run rounds of `data_parallel` until the switch, and give their last state to the `RoundFn` of
    `local_sgd`: it has the same form, and the workers' optimizer states are alike. (An optimizer
    that draws noise then draws the same on all workers.)

    Args:
      grad_fn, optimizer, optimizer_state, model_state, worker_map: as in `local_sgd`.
      switch_step: the step at which the period changes.
      local_steps: H from there on.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Source: Lin, Stich, Patel, Jaggi, "Don't Use Large Mini-Batches, Use Local SGD", ICLR 2020,
    https://arxiv.org/abs/1808.07217.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> method = post_local_sgd(grad_fn, optax.sgd(0.1), switch_step=2, local_steps=4)
    >>> list(jaxlocal.periods.lengths(method.period, 8))
    [1, 1, 4, 2]
    """
    return local_sgd(
        grad_fn,
        optimizer,
        period=periods.post_local(switch_step, local_steps),
        optimizer_state=optimizer_state,
        model_state=model_state,
        worker_map=worker_map,
    )


@explain_arguments
def swap(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    switch_step: int,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """SWAP: Local SGD with H = 1 until a step, then workers alone, averaged once at the end.

    Args:
      grad_fn, optimizer, optimizer_state, model_state, worker_map: as in `local_sgd`.
      switch_step: the step from which on workers train alone.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Source: Gupta, Serrano, DeCoste, "Stochastic Weight Averaging in Parallel", ICLR 2020,
    https://arxiv.org/abs/2001.02312.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> method = swap(grad_fn, optax.sgd(0.1), switch_step=2)
    >>> list(jaxlocal.periods.lengths(method.period, 8))
    [1, 1, 6]
    """
    return local_sgd(
        grad_fn,
        optimizer,
        period=periods.swap(switch_step),
        optimizer_state=optimizer_state,
        model_state=model_state,
        worker_map=worker_map,
    )
