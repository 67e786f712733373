"""Methods whose messages are compressed, as slow float64 NumPy loops; the conventions are those of
`reference`.

A compressor makes what all workers say of what they would say: `compress(vectors, message)`, rows
of `[workers, dim]`, where `message` tells one message of a run from another. What is said in the
middle of a step, of gradients or updates, has the step's 0-based number; what is said of models
afterwards the number of steps that are over.
Updates are what is added to a model, u_i = −p_i in terms of the CSER paper. A worker that skips a
step has an update of zero, keeps its optimizer's state and hears the others. Errors are what a
worker has not said yet, `[steps + 1, workers, dim]` as the models are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from reference import Array, Gradient, Schedule, weighted_mean

Compress = Callable[[Array, int], Array]
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
    """What every method is told of the workers and of what each does on its own."""

    gradient: Gradient
    start: Array
    learning_rate: Schedule
    weights: ArrayLike
    rule: Rule = sgd()
    active: NDArray[np.bool_] | None = None  # [steps, workers]; None if all always are


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
    """Local steps, then error feedback on how far a worker came, Basu et al., arXiv 1906.02367.

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


def sparse_loco(
    run: Run,
    periods: Sequence[int],
    compress: Compress,
    error_decay: float,
    outer_learning_rate: float,
    outer_momentum: float = 0.0,
    nesterov: bool = False,
) -> tuple[Array, Array]:
    """Errors that are forgotten and an outer optimizer, arXiv 2508.15706.

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
    """CSER, Algorithm 2 of Xie et al., arXiv 2007.13221: gradients said, an error buffer each.

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
    """M-CSER, implementation I, Algorithm 4 of arXiv 2007.13221, for any optimizer: its updates are
    said, and its state is a worker's own.

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


def mll_sgd(
    run: Run,
    steps: int,
    steps_per_hub_average: int,
    hub_averages_per_mix: int,
    hub_of_worker: Sequence[int],
    mixing: Array,
    compress: Compress,
) -> tuple[Array, Array]:
    """Multi-Level Local SGD whose hub averages feed errors back, z_d being where hub d began.

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


def each(one: Callable[[Array], Array]) -> Compress:
    """What every worker says of its own vector alone, the same at every message."""
    return lambda vectors, message: np.stack([one(vector) for vector in vectors])


identity = each(lambda vector: vector)
zero = each(np.zeros_like)


def top_k(kept: int) -> Compress:
    """The entries of largest magnitude, of two alike the first."""

    def one(vector: Array) -> Array:
        order = sorted(range(len(vector)), key=lambda i: -abs(vector[i]))
        sent = np.zeros_like(vector)
        sent[order[:kept]] = vector[order[:kept]]
        return sent

    return each(one)


sign = each(lambda vector: np.where(vector < 0, -1.0, 1.0) * np.mean(np.abs(vector)))


def shared_block(kept: int, start_of: Callable[[int], int]) -> Compress:
    """So many entries from start_of(message) on, around the end, the same on all workers."""

    def compress(vectors: Array, message: int) -> Array:
        sent = np.zeros_like(vectors)
        for offset in range(kept):
            column = (start_of(message) + offset) % vectors.shape[1]
            sent[:, column] = vectors[:, column]
        return sent

    return compress


class _Workers:
    """The models, errors and optimizer states of all workers, and what the first two have been."""

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
        """So many steps in which nothing is said; the step after them."""
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
        """In place of what the last step of the round left."""
        self._history.pop()
        self.after_step(np.broadcast_to(models, errors.shape).copy(), errors)

    def trajectories(self) -> tuple[Array, Array]:
        models, errors = zip(*self._history, strict=True)
        return np.stack(models), np.stack(errors)

    def _is_active(self, step: int, worker: int) -> bool:
        return self._run.active is None or bool(self._run.active[step, worker])
