"""Methods on networks: workers or hubs of workers that mix models with their neighbours."""

import numpy as np
import optax

from jaxlocal import periods
from jaxlocal.communication import mixing, topology
from jaxlocal.errors import explain_arguments
from jaxlocal.parallel.layout import Layout
from jaxlocal.stages.compose import repeat, sequence
from jaxlocal.stages.error_feedback import error_feedback
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.local_step import local_step
from jaxlocal.stages.sync import sync
from jaxlocal.types import Compressor, Method, Period


@explain_arguments
def mll_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    matrix: np.ndarray,
    local_steps: int,
    hub_period: int | Period,
    compressor: Compressor | str | None = None,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """Multi-Level Local SGD (MLL-SGD): workers average in their hub, hubs mix with neighbours.

        every step:        x_i ← optimizer_i(x_i, g_i) with probability p_i, else x_i stays
        every τ steps:     z_d = Σ_{i in d} v_i x_i;  the workers of hub d restart from z_d
        every q·τ steps:   y_d = Σ_j H_jd z_j;        the workers of hub d restart from y_d

    Symbols: x_i the model of worker i, g_i its gradient, v_i its weight in its hub, p_i its rate.
    Weights and rates belong to the `Layout`.

    Args:
      grad_fn: the gradient of one worker, as `gradients(loss)` makes it.
      optimizer: any optax transformation; every worker runs its own state of it.
      matrix: H [D, D] over D hubs, see `topology.mixing_matrix`.
      local_steps: τ, steps between hub averages.
      hub_period: q, hub averages between two mixings of hubs; or a rule for the steps of a round,
        in multiples of τ.
      compressor: of the messages from workers to their hub, with error feedback; hubs mix whole
        models. By default messages are sent uncompressed.
      optimizer_state: at an average "keep", "average" or "reset" optimizer states, see
        `stages.sync`.
      model_state: "keep" or "average" model state such as batch statistics.
      worker_map: how a device runs its workers: "vmap", "map" or "blocks:N"; by default the
        fastest.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Source: Castiglia, Das, Patterson, "Multi-Level Local SGD: Distributed SGD for Heterogeneous
    Hierarchical Networks", ICLR 2021, https://arxiv.org/abs/2007.13819. Differs from the released
    code in: hubs mix all at once, as in the paper's Algorithm 1, and not in place one after
    another.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> hubs = jaxlocal.Layout(hubs=4, workers_per_hub=5)
    >>> graph = jaxlocal.topology.hub_graph("ring", hubs.hubs)
    >>> matrix = jaxlocal.topology.mixing_matrix(graph, hubs.hub_weight)
    >>> mll_sgd(grad_fn, optax.sgd(0.1), matrix=matrix, local_steps=8, hub_period=4).inner.steps
    8
    """
    options = {
        "optimizer_state": optimizer_state,
        "optimizer": optimizer,
        "model_state": model_state,
    }
    steps = repeat(local_step(grad_fn, optimizer, worker_map=worker_map), local_steps)
    if compressor is None:
        inner = sequence(steps, sync(mixing.hub_mean(), **options))
    else:
        inner = error_feedback(mixing.hub_mean(), compressor, after=steps, **options)
    mix = sync(mixing.hub_diffusion(matrix), **options)
    period = hub_period if isinstance(hub_period, Period) else hub_period * local_steps
    return Method(inner, mix, optimizer, periods.of(period, optimizer))


@explain_arguments
def hl_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    layout: Layout,
    local_steps: int,
    hub_period: int | Period,
    compressor: Compressor | str | None = None,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """Hierarchical Local SGD: Multi-Level Local SGD whose hubs all average with each other.

    Args:
      layout: the workers, whose weights the average of the hubs takes.
      grad_fn, optimizer, local_steps, hub_period, compressor, optimizer_state, model_state,
        worker_map: as in `mll_sgd`.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Source: as `mll_sgd`, which has it as the special case of a complete hub graph.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> hubs = jaxlocal.Layout(hubs=4, workers_per_hub=5)
    >>> hl_sgd(grad_fn, optax.sgd(0.1), layout=hubs, local_steps=8, hub_period=4).inner.steps
    8
    """
    matrix = topology.mixing_matrix(~np.eye(layout.hubs, dtype=bool), layout.hub_weight)
    return mll_sgd(
        grad_fn,
        optimizer,
        matrix=matrix,
        local_steps=local_steps,
        hub_period=hub_period,
        compressor=compressor,
        optimizer_state=optimizer_state,
        model_state=model_state,
        worker_map=worker_map,
    )


@explain_arguments
def cooperative_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    matrix: np.ndarray,
    period: int | Period = 1,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    worker_map: str | None = None,
) -> Method:
    """Cooperative SGD, decentralised Local SGD: workers mix with their neighbours, without hubs.

        every step:     x_i ← optimizer_i(x_i, g_i)
        every H steps:  x_i ← Σ_j W_ji x_j

    Args:
      grad_fn: the gradient of one worker, as `gradients(loss)` makes it.
      optimizer: any optax transformation; every worker runs its own state of it.
      matrix: W [K, K], for a layout of K hubs with one worker each; see `topology.mixing_matrix`.
      period: H, or a rule for it.
      optimizer_state: at an average "keep", "average" or "reset" optimizer states, see
        `stages.sync`.
      model_state: "keep" or "average" model state such as batch statistics.
      worker_map: how a device runs its workers: "vmap", "map" or "blocks:N"; by default the
        fastest.

    Returns:
      A `Method`, to be given to `RoundFn`.

    Source: Wang, Joshi, "Cooperative SGD: A Unified Framework for the Design and Analysis of
    Local-Update SGD Algorithms", JMLR 2021, https://arxiv.org/abs/1808.07576.

    >>> import jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> workers = jaxlocal.Layout(hubs=8)
    >>> ring = jaxlocal.topology.hub_graph("ring", 8)
    >>> matrix = jaxlocal.topology.mixing_matrix(ring, workers.hub_weight)
    >>> cooperative_sgd(grad_fn, optax.sgd(0.1), matrix=matrix, period=4).period.description
    'constant, H = 4'
    """
    mixer = mixing.hub_diffusion(matrix, workers_per_hub=1)
    mix = sync(mixer, optimizer_state=optimizer_state, optimizer=optimizer, model_state=model_state)
    step = local_step(grad_fn, optimizer, worker_map=worker_map)
    return Method(step, mix, optimizer, periods.of(period, optimizer))
