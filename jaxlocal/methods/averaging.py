"""Every named method, as the composition that it is.

A method says what a worker does at a step, who averages with whom when, and how long a round is.
Symbols: K workers in D hubs of N; x_i the model of worker i, a_i its weight, p_i the probability
that it takes its step at a step; η the learning rate; H the steps of a round; τ the steps between
hub averages and q the hub averages between two mixings of hubs.

Each takes `grad_fn` (see `gradient.gradients`) and any optax optimizer, of which every worker runs
its own. At a synchronisation `optimizer_state` says whether the workers' optimizer states are kept,
averaged or reset, and `model_state` whether what models keep besides parameters, such as batch
statistics, is kept or averaged. `options` are those of the step: `worker_map`. Methods whose
messages are compressed are in `compressed`.
"""

import numpy as np
import optax

from jaxlocal import periods
from jaxlocal.communication import mixing, topology
from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.layout import Layout
from jaxlocal.stages.compose import in_turn, repeat, sequence
from jaxlocal.stages.error_feedback import error_feedback
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.local_step import local_step
from jaxlocal.stages.outer_step import outer_step
from jaxlocal.stages.overlap import overlapped
from jaxlocal.stages.sync import sync, sync_model_state
from jaxlocal.types import Compressor, Method, Period


def data_parallel(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    model_state: str = "keep",
    compressor: Compressor | None = None,
    **options,
) -> Method:
    """Data parallelism: gradients are averaged at every step, before the optimizer.

        every step:  g ← Σ a_i C(g_i);  x ← optimizer(x, g), the same on every worker

    Args:
      compressor: C, without feedback of what it leaves out, as QSGD does it. Where E C(g) is less
        than g (1 / (1 + ω) of it with `compression.qsgd`, the part that is kept with `grbs` and
        `random_k`), so are the steps of SGD. By default gradients are averaged whole.
    """
    inner = local_step(
        grad_fn, optimizer, gradient_mixer=mixing.mean(), compressor=compressor, **options
    )
    return Method(
        inner, sync_model_state(mixing.mean(), model_state), optimizer, periods.constant(1)
    )


def local_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    period: Period | int = 1,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    **options,
) -> Method:
    """Local SGD, or Local OPT with any optimizer: steps of one's own, then the average.

        every step:     x_i ← optimizer_i(x_i, g_i)
        every H steps:  x_i ← Σ_j a_j x_j

    Args:
      period: H, or a rule for it: `periods.quadratic` makes this the Quadratic Synchronization
        Rule.

    Source: Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, https://arxiv.org/abs/1805.09767.
    """
    inner = local_step(grad_fn, optimizer, **options)
    average = sync(mixing.mean(), optimizer_state, optimizer, model_state)
    return Method(inner, average, optimizer, periods.of(period))


def post_local_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    switch_step: int,
    local_steps: int,
    **options,
) -> Method:
    """Post-local SGD: Local SGD with H = 1 until a step, then H = `local_steps`.

    Source: Lin, Stich, Patel, Jaggi, "Don't Use Large Mini-Batches, Use Local SGD", ICLR 2020, https://arxiv.org/abs/1808.07217.
    """
    return local_sgd(grad_fn, optimizer, periods.post_local(switch_step, local_steps), **options)


def swap(
    grad_fn: GradFn, optimizer: optax.GradientTransformation, switch_step: int, **options
) -> Method:
    """SWAP: Local SGD with H = 1 until a step, then workers on their own, averaged once at the end.

    Source: Gupta, Serrano, DeCoste, "Stochastic Weight Averaging in Parallel", ICLR 2020, https://arxiv.org/abs/2001.02312.
    """
    return local_sgd(grad_fn, optimizer, periods.swap(switch_step), **options)


def mll_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    matrix: np.ndarray,
    local_steps: int,
    hub_period: int | Period,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    compressor: Compressor | None = None,
    **options,
) -> Method:
    """Multi-Level Local SGD: workers average in their hub, hubs mix with their neighbours.

        every step:        x_i ← optimizer_i(x_i, g_i) with probability p_i, else x_i stays
        every τ steps:     z_d = Σ_{i in d} v_i x_i;  its workers restart from it
        every q·τ steps:   y_d = Σ_j H_jd z_j;        the workers of hub d restart from it

    Args:
      matrix: H [D, D], see `topology.mixing_matrix`.
      local_steps: τ, steps.
      hub_period: q, hub averages; or a rule for the steps of a round, in multiples of τ.
      compressor: of what workers say to their hub, with error feedback; hubs mix whole models.

    Source: Castiglia, Das, Patterson, ICLR 2021, https://arxiv.org/abs/2007.13819. Differs from the
    released code, whose hubs mix in place, one after another; here they mix at once, as in the
    paper's Algorithm 1.
    """
    state = (optimizer_state, optimizer, model_state)
    steps = repeat(local_step(grad_fn, optimizer, **options), local_steps)
    if compressor is None:
        inner = sequence(steps, sync(mixing.hub_mean(), *state))
    else:
        inner = error_feedback(mixing.hub_mean(), compressor, None, 1.0, steps, *state)
    period = hub_period if isinstance(hub_period, Period) else hub_period * local_steps
    return Method(inner, sync(mixing.hub_diffusion(matrix), *state), optimizer, periods.of(period))


def hl_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    local_steps: int,
    hub_period: int | Period,
    **options,
) -> Method:
    """Hierarchical Local SGD: Multi-Level Local SGD whose hubs all average with each other."""
    matrix = topology.mixing_matrix(~np.eye(layout.hubs, dtype=bool), layout.hub_weight)
    return mll_sgd(grad_fn, optimizer, matrix, local_steps, hub_period, **options)


def cooperative_sgd(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    matrix: np.ndarray,
    period: int | Period,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    **options,
) -> Method:
    """Cooperative SGD, decentralised: every worker is a hub, and mixes with its neighbours after
    its local steps.

        every step:     x_i ← optimizer_i(x_i, g_i)
        every H steps:  x_i ← Σ_j W_ji x_j

    Args:
      matrix: W [K, K] over a layout of K hubs with one worker each; see `topology.mixing_matrix`.
      period: H, or a rule for it.

    Source: Wang, Joshi, "Cooperative SGD", JMLR 2021, https://arxiv.org/abs/1808.07576.
    """
    inner = local_step(grad_fn, optimizer, **options)
    mixer = mixing.hub_diffusion(matrix, workers_per_hub=1)
    mix = sync(mixer, optimizer_state, optimizer, model_state)
    return Method(inner, mix, optimizer, periods.of(period))


def slowmo(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    period: Period | int = 1,
    outer_optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    **options,
) -> Method:
    """SlowMo: Local SGD whose averages are smoothed by a slow momentum u.

        every step:     x_i ← optimizer_i(x_i, g_i)
        every H steps:  u ← β u + (y − Σ_j a_j x_j) / η;  y ← y − α η u;  x_i ← y

    y is the anchor, the model from which all workers started the round; α is the slow learning
    rate and β the slow momentum.

    Args:
      learning_rate: η, as the optimizer follows it.
      period: H, or a rule for it.
      outer_optimizer: what makes −α u of the pseudo-gradient (y − Σ a_j x_j) / η; by default
        `optax.sgd(1.0, momentum=0.7)`, α = 1 and β = 0.7.
      optimizer_state: "reset", "keep" and "average" are the paper's three buffer strategies.

    Source: Wang, Tantia, Ballas, Rabbat, "SlowMo: Improving Communication-Efficient Distributed SGD
    with Slow Momentum", ICLR 2020, https://arxiv.org/abs/1910.00643. Differs from the paper in: η
    may change inside a round, of which its mean is taken.
    """
    outer = outer_optimizer or optax.sgd(1.0, momentum=0.7)
    state = (optimizer_state, optimizer, model_state)
    return Method(
        local_step(grad_fn, optimizer, **options),
        outer_step(mixing.mean(), outer, learning_rate, *state),
        optimizer,
        periods.of(period),
    )


def diloco(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    period: Period | int = 1,
    outer_optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "keep",
    model_state: str = "keep",
    **options,
) -> Method:
    """DiLoCo: many local steps, then one step of an outer optimizer on how far workers came.

        every step:     x_i ← optimizer_i(x_i, g_i)
        every H steps:  d ← y − Σ_j a_j x_j;  y ← outer(y, d);  x_i ← y

    y is the anchor, the model from which all workers started the round.

    Args:
      period: H, or a rule for it; 500 in the paper.
      outer_optimizer: by default `optax.sgd(0.7, momentum=0.9, nesterov=True)`, the paper's. With
        `optax.sgd(1.0)` this is Local SGD.

    Source: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models",
    2023, https://arxiv.org/abs/2311.08105; its optimizer is AdamW.
    """
    outer = outer_optimizer or optax.sgd(0.7, momentum=0.9, nesterov=True)
    state = (optimizer_state, optimizer, model_state)
    return Method(
        local_step(grad_fn, optimizer, **options),
        outer_step(mixing.mean(), outer, None, *state),
        optimizer,
        periods.of(period),
    )


def streaming_diloco(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    period: Period | int,
    outer_optimizer: optax.GradientTransformation | None = None,
    fragments: int = 2,
    delay_steps: int = 1,
    mixing_factor: float = 0.5,
    model_state: str = "keep",
    **options,
) -> Method:
    """Streaming DiLoCo: DiLoCo of a fragment of the model at a time, averaged while steps run.

        every step:       x_i ← optimizer_i(x_i, g_i)
        every H/P steps:  of the next fragment p of P, with the x_j of τ steps ago,
                          d ← y_p − Σ_j a_j x_jp;
                          y_p ← outer_p(y_p, d);  x_ip ← α x_ip + (1 − α) y_p

    y is the anchor. A round is H/P steps, the last τ of which run while the pseudo-gradient d of a
    fragment is averaged. See `overlap.overlapped` for where a machine does both at once. What ends
    a round is one program, which has the τ steps once for each fragment and compiles as long.

    Args:
      period: H, the steps between two synchronisations of the same fragment, or a rule for it, in
        multiples of P.
      outer_optimizer: by default `optax.sgd(0.7, momentum=0.9, nesterov=True)`, DiLoCo's.
      fragments: P; tensors are spread over them by `overlap.fragments_of`.
      delay_steps: τ, less than H/P.
      mixing_factor: α; 0 throws away what a fragment has learnt in the τ steps. With P = 1, τ = 0
        and α = 0 this is DiLoCo.

    Training ends on the synchronisation of one fragment; the others were synchronised some rounds
    before.

    Source: Douillard et al., "Streaming DiLoCo with overlapping communication", 2025,
    https://arxiv.org/abs/2501.18512. Differs from the paper in: messages are not quantised, and
    every message is received by the end of training, since it is sent τ steps before a round's end.
    """
    if delay_steps < 0:
        raise ConfigurationError(f"the delay must be at least 0 steps, got {delay_steps}")
    rounds = periods.split(period, fragments)
    inner = local_step(grad_fn, optimizer, **options)
    outer = outer_optimizer or optax.sgd(0.7, momentum=0.9, nesterov=True)
    beside = repeat(inner, delay_steps) if delay_steps else sequence()
    turns = [
        overlapped(beside, mixing.mean(), outer, mixing_factor, fragment, fragments, model_state)
        for fragment in range(fragments)
    ]
    return Method(inner, in_turn(*turns), optimizer, rounds)
