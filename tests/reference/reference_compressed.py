"""Methods with compressed messages as slow float64 NumPy loops, in the conventions of `reference`.

A compressor `compress(vectors, message)` maps the vectors of all workers, rows of `[workers, dim]`,
to what they send. `message` is a number that differs between the messages of a run: for gradients
and updates, sent within a step, the 0-based step; for models, sent after a step, the number of
steps taken. An update u_i is added to a model, u_i = −p_i in terms of the CSER paper. A worker that
skips a step has a zero update, keeps its optimizer state and receives the messages of others. The
errors e_i of a worker are what its messages have left out, `[steps + 1, workers, dim]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from reference import Array, Gradient, Schedule, weighted_mean
from reference_compressors import Compress

Rule = Callable[[Array, Any, Array, float], tuple[Array, Any]]  # (x, state, g, η) -> (u, state)


def sgd(momentum: float = 0.0, nesterov: bool = False) -> Rule:
    """m ← β m + g; u = −η m, or −η (g + β m)."""

    def rule(x: Array, state: Any, g: Array, rate: float) -> tuple[Array, Any]:
        m = g if state is None else momentum * state + g
        return -rate * (g + momentum * m if nesterov else m), m

    return rule


def adamw(beta1: float, beta2: float, weight_decay: float, epsilon: float = 1e-8) -> Rule:
    """m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; u = −η (m̂/(√v̂ + ε) + λx)."""

    def rule(x: Array, state: Any, g: Array, rate: float) -> tuple[Array, Any]:
        m, v, n = (0.0, 0.0, 0) if state is None else state
        m, v, n = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2, n + 1
        adam = m / (1 - beta1**n) / (np.sqrt(v / (1 - beta2**n)) + epsilon)
        return -rate * (adam + weight_decay * x), (m, v, n)

    return rule


class Run(NamedTuple):
    """The arguments of every method: the workers and their optimizer."""

    gradient: Gradient
    start: Array
    learning_rate: Schedule
    weights: ArrayLike
    rule: Rule = sgd()
    active: NDArray[np.bool_] | None = None  # [steps, workers]; None: all of them always


def psync(
    vectors: Array, compress: Compress, weights: ArrayLike, message: int
) -> tuple[Array, Array]:
    """Partial synchronisation: s_i = C(v_i); r_i = v_i − s_i; v_i ← Σ a_j s_j + r_i. Also r_i."""
    sent = compress(vectors, message)
    residuals = vectors - sent
    return weighted_mean(sent, weights) + residuals, residuals


def data_parallel(run: Run, steps: int, compress: Compress) -> Array:
    """One model [steps + 1, dim] on g = Σ a_i C(g_i): no error is fed back."""
    workers, state = _Workers(run), None
    for step in range(steps):
        gradients = compress(workers.gradients(step), step)
        g, x = weighted_mean(gradients, run.weights), workers.models[0]
        update, state = run.rule(x, state, g, run.learning_rate(step))
        workers.after_step(workers.models + update, workers.errors)
    return workers.trajectories()[0][:, 0]


def ef_sgd(run: Run, steps: int, compress: Compress) -> tuple[Array, Array]:
    """Error feedback at every step, Karimireddy et al., arXiv 1901.09847.

    p_i = e_i + u_i; e_i ← p_i − C(p_i); x ← x + Σ a_i C(p_i).
    """
    workers = _Workers(run)
    for step in range(steps):
        wanted = workers.errors + workers.updates(step)
        sent = compress(wanted, step + 1)
        workers.after_step(workers.models + weighted_mean(sent, run.weights), wanted - sent)
    return workers.trajectories()


def qsparse_local_sgd(run: Run, periods: Sequence[int], compress: Compress) -> tuple[Array, Array]:
    """Local steps, then error feedback on the sum of updates, Basu et al., arXiv 1906.02367.

    every H: p_i = e_i + x_i − y; e_i ← p_i − C(p_i); y ← y + Σ a_i C(p_i); x_i ← y
    """
    workers, common, step = _Workers(run), np.asarray(run.start, np.float64), 0
    for local_steps in periods:
        step = workers.local_steps(step, local_steps)
        wanted = workers.errors + workers.models - common
        sent = compress(wanted, step)
        common = common + weighted_mean(sent, run.weights)
        workers.after_round(common, wanted - sent)
    return workers.trajectories()


def qsparse_with_decay_outside(
    run: Run,
    periods: Sequence[int],
    compress: Compress,
    weight_decay: float,
    momentum: float,
    nesterov: bool = False,
) -> tuple[Array, Array]:
    """QSparse-local-SGD whose weight decay moves the common model and is in no message; with rounds
    of one step it is EF-SGD as in the released code of CSER, arXiv 2007.13221.

    every step: x_i ← x_i + u_i; w ← β w + λ y; d = −η w, with Nesterov −η (λ y + β w);
                y ← y + d; x_i ← x_i + d
    every H:    as in QSparse-local-SGD
    """
    workers, common, step = _Workers(run), np.asarray(run.start, np.float64), 0
    velocity = np.zeros_like(common)
    for local_steps in periods:
        for _ in range(local_steps):
            updates = workers.updates(step)
            pull = weight_decay * common
            velocity = momentum * velocity + pull
            towards_zero = pull + momentum * velocity if nesterov else velocity
            decay = -run.learning_rate(step) * towards_zero
            common = common + decay
            workers.after_step(workers.models + updates + decay, workers.errors)
            step += 1
        wanted = workers.errors + workers.models - common
        sent = compress(wanted, step)
        common = common + weighted_mean(sent, run.weights)
        workers.after_round(common, wanted - sent)
    return workers.trajectories()


def sparse_loco(
    run: Run,
    periods: Sequence[int],
    compress: Compress,
    error_decay: float,
    outer_learning_rate: float,
    outer_momentum: float = 0.0,
    nesterov: bool = False,
) -> tuple[Array, Array]:
    """Error feedback with decay, and an outer optimizer, arXiv 2508.15706.

    every H: p_i = ρ e_i + x_i − y; e_i ← p_i − C(p_i); d = −Σ a_i C(p_i); v ← β v + d;
             y ← y − α v, with Nesterov y − α (d + β v); x_i ← y
    """
    workers, common, step = _Workers(run), np.asarray(run.start, np.float64), 0
    velocity = np.zeros_like(common)
    for local_steps in periods:
        step = workers.local_steps(step, local_steps)
        wanted = error_decay * workers.errors + workers.models - common
        sent = compress(wanted, step)
        d = -weighted_mean(sent, run.weights)
        velocity = outer_momentum * velocity + d
        update = d + outer_momentum * velocity if nesterov else velocity
        common = common - outer_learning_rate * update
        workers.after_round(common, wanted - sent)
    return workers.trajectories()


def cser(
    run: Run, periods: Sequence[int], gradient_compress: Compress, reset_compress: Compress
) -> tuple[Array, Array]:
    """CSER, Algorithm 2 of Xie et al., arXiv 2007.13221: compressed gradients, error buffers.

    every step: g'_i, r_i ← PSync(g_i, C2); x_i ← x_i − η g'_i; e_i ← e_i − η r_i
    every H:    e'_i, r_i ← PSync(e_i, C1); x_i ← x_i − e_i + e'_i; e_i ← r_i
    """
    workers, step = _Workers(run), 0
    for local_steps in periods:
        for _ in range(local_steps):
            gradients, rate = workers.gradients(step), run.learning_rate(step)
            synced, residuals = psync(gradients, gradient_compress, run.weights, step)
            workers.after_step(workers.models - rate * synced, workers.errors - rate * residuals)
            step += 1
        workers.reset_errors(reset_compress, step)
    return workers.trajectories()


def m_cser_1(
    run: Run, periods: Sequence[int], update_compress: Compress, reset_compress: Compress
) -> tuple[Array, Array]:
    """M-CSER, implementation I, Algorithm 4 of arXiv 2007.13221, for any optimizer of a
    worker, whose updates are compressed.

    every step: u'_i, r_i ← PSync(u_i, C2); x_i ← x_i + u'_i; e_i ← e_i + r_i
    every H:    as in Algorithm 2
    """
    workers, step = _Workers(run), 0
    for local_steps in periods:
        for _ in range(local_steps):
            updates = workers.updates(step)
            synced, residuals = psync(updates, update_compress, run.weights, step)
            workers.after_step(workers.models + synced, workers.errors + residuals)
            step += 1
        workers.reset_errors(reset_compress, step)
    return workers.trajectories()


def m_cser_2(
    run: Run, periods: Sequence[int], model_compress: Compress, reset_compress: Compress
) -> Array:
    """M-CSER, implementation II: models are partially synchronised, and there are no errors.

    every step: x_i ← x_i + u_i; x_i ← PSync(x_i, C2);  every H: x_i ← PSync(x_i, C1)
    """
    workers, step = _Workers(run), 0
    for local_steps in periods:
        for _ in range(local_steps):
            stepped = workers.models + workers.updates(step)
            step += 1
            models, _ = psync(stepped, model_compress, run.weights, step)
            workers.after_step(models, workers.errors)
        models, _ = psync(workers.models, reset_compress, run.weights, step)
        workers.after_round(models, workers.errors)
    return workers.trajectories()[0]


def m_cser_released(
    run: Run, periods: Sequence[int], model_compress: Compress, reset_compress: Compress
) -> Array:
    """M-CSER as its authors' trainer has it: implementation II, but the last step of a round sends
    one message, with C1.

    every step: x_i ← x_i + u_i; then x_i ← PSync(x_i, C1) at the last step of a round, and
    x_i ← PSync(x_i, C2) at the others
    """
    workers, step = _Workers(run), 0
    for local_steps in periods:
        for number in range(local_steps):
            stepped = workers.models + workers.updates(step)
            step += 1
            compress = reset_compress if number == local_steps - 1 else model_compress
            models, _ = psync(stepped, compress, run.weights, step)
            workers.after_step(models, workers.errors)
    return workers.trajectories()[0]


def mll_sgd(
    run: Run,
    steps: int,
    steps_per_hub_average: int,
    hub_averages_per_mix: int,
    hub_of_worker: Sequence[int],
    mixing: Array,
    compress: Compress,
) -> tuple[Array, Array]:
    """Multi-Level Local SGD with error feedback in hub averages, from the hub model z_d.

    every τ:  p_i = e_i + x_i − z_d; e_i ← p_i − C(p_i); x_i ← z_d ← z_d + Σ_{i in d} v_i C(p_i)
    every qτ: x_i ← z_d ← Σ_j H_jd z_j
    """
    workers, of_worker = _Workers(run), np.asarray(hub_of_worker)
    hubs = np.stack([workers.models[0]] * len(mixing))
    for done in range(steps_per_hub_average, steps + 1, steps_per_hub_average):
        workers.local_steps(done - steps_per_hub_average, steps_per_hub_average)
        wanted = workers.errors + workers.models - hubs[of_worker]
        sent = compress(wanted, done)
        for hub in range(len(hubs)):
            members = np.flatnonzero(of_worker == hub)
            hubs[hub] += weighted_mean(sent[members], np.take(run.weights, members))
        if done % (steps_per_hub_average * hub_averages_per_mix) == 0:
            hubs = np.stack([weighted_mean(hubs, column) for column in mixing.T])
        workers.after_round(hubs[of_worker], wanted - sent)
    return workers.trajectories()


class _Workers:
    """The models, errors and optimizer states of all workers, and the history of the first two."""

    def __init__(self, run: Run) -> None:
        self._run, count = run, np.size(run.weights)
        self.models = np.stack([np.asarray(run.start, np.float64)] * count)
        self.errors = np.zeros_like(self.models)
        self._states: list[Any] = [None] * count
        self._history = [(self.models, self.errors)]

    def gradients(self, step: int) -> Array:
        """g_i of every worker; zero where it skips."""
        gradients = np.zeros_like(self.models)
        for worker, x in enumerate(self.models):
            if self._is_active(step, worker):
                gradients[worker] = self._run.gradient(worker, x, step)
        return gradients

    def updates(self, step: int) -> Array:
        """u_i of every worker, zero where it skips; its optimizer takes its step."""
        updates, gradients = np.zeros_like(self.models), self.gradients(step)
        for worker, (x, g) in enumerate(zip(self.models, gradients, strict=True)):
            if self._is_active(step, worker):
                updates[worker], self._states[worker] = self._run.rule(
                    x, self._states[worker], g, self._run.learning_rate(step)
                )
        return updates

    def local_steps(self, step: int, count: int) -> int:
        """Take a number of steps without messages; returns the step after them."""
        for now in range(step, step + count):
            self.after_step(self.models + self.updates(now), self.errors)
        return step + count

    def reset_errors(self, compress: Compress, message: int) -> None:
        """e'_i, r_i ← PSync(e_i, C1); x_i ← x_i − e_i + e'_i; e_i ← r_i."""
        synced, residuals = psync(self.errors, compress, self._run.weights, message)
        self.after_round(self.models - self.errors + synced, residuals)

    def after_step(self, models: Array, errors: Array) -> None:
        self.models, self.errors = models, errors
        self._history.append((models, errors))

    def after_round(self, models: Array, errors: Array) -> None:
        """Replace the models and errors after the last step of the round."""
        self._history.pop()
        self.after_step(np.broadcast_to(models, errors.shape).copy(), errors)

    def trajectories(self) -> tuple[Array, Array]:
        models, errors = zip(*self._history, strict=True)
        return np.stack(models), np.stack(errors)

    def _is_active(self, step: int, worker: int) -> bool:
        return self._run.active is None or bool(self._run.active[step, worker])
