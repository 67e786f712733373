"""Re-estimate batch statistics for the average model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel import collectives
from jaxlocal.parallel.layout import CONTEXT, SINGLE
from jaxlocal.parallel.leaves import check_same
from jaxlocal.parallel.mesh import place
from jaxlocal.parallel.pool import check_indices, fetch, pool_size
from jaxlocal.parallel.sharding import batch_specs, named_shardings
from jaxlocal.parallel.worker_maps import over_workers
from jaxlocal.training.checks import leading_size
from jaxlocal.training.common_state import CommonState, every_row, held, held_as, models_of
from jaxlocal.training.programs import BATCHES, OnModels
from jaxlocal.training.round import RoundFn
from jaxlocal.types import TrainState, Tree

Apply = Callable[[Tree, Tree, Tree], Tree]
_Leaves = list[Any]


class Reestimation:
    """Re-estimate the batch statistics of the average model: `state = reestimation(state)`.

    The average of the workers' running statistics is not that of the average model. Here every
    worker applies the average model u = Σ a_i x_i to batches of its data, and the statistics of
    these batches replace those in the model state.

    A running statistic moves by s ← μ s + (1 − μ) b, where b is the statistic of a batch. The
    result is the mean of b over the batches of a worker, averaged over workers with weights a_i. It
    does not depend on μ or on the statistics before. Values that do not move by this rule, and
    integers, stay as they are in `round_fn.mean(state)`.

    Args:
      round_fn: the round function of the states.
      apply: `apply(params, model_state, batch)` gives the model state after a batch in training.
      batches: leaves [batches, hubs, workers_per_hub, batch, ...]; indices where the round function
        has a pool of examples.

    Raises:
      ConfigurationError: the batches do not fit the layout or the pool; raised by a call for
        statistics in half precision.

    >>> import jaxlocal, numpy, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w * batch).mean())
    >>> method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.1))
    >>> round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
    >>> state = round_fn.init(numpy.float32(1), jax.random.key(0), {"mean": numpy.float32(0)})
    >>> def apply(params, model_state, batch):
    ...     return {"mean": 0.9 * model_state["mean"] + 0.1 * batch.mean()}
    >>> batches = numpy.array([[[[1.0, 2.0], [3.0, 4.0]]]], numpy.float32)  # one for each worker
    >>> Reestimation(round_fn, apply, batches)(state).model_state["mean"].round(4)
    Array([[2.5, 2.5]], dtype=float32)

    Reference: X. Gu et al., "A Quadratic Synchronization Rule for Distributed Deep Learning", ICLR
    2024, https://arxiv.org/abs/2310.14423, whose evaluations re-estimate batch statistics.
    """

    def __init__(self, round_fn: RoundFn, apply: Apply, batches: Tree) -> None:
        if not leading_size(batches, round_fn.layout):
            raise ConfigurationError("statistics are re-estimated on at least 1 batch, got 0")
        if (examples := pool_size(round_fn.context.data)) is not None:
            check_indices(batches, examples)
        self._round_fn, self._context = round_fn, round_fn.context
        mesh = round_fn.mesh
        self._batches = place(batches, named_shardings(mesh, batch_specs(mesh, BATCHES, batches)))
        self._program = OnModels(_statistics_of(apply), mesh, (CONTEXT, BATCHES), SINGLE)

    def __call__(self, state: TrainState) -> TrainState:
        """The state with the re-estimated model state on every worker; `state` stays usable."""
        self._round_fn.check_models(state)
        estimates = self._program(models_of(state), self._context, self._batches)
        if isinstance(state, CommonState):
            return held_as(state, held(state)._replace(model_state=estimates))
        return state._replace(model_state=every_row(estimates, self._round_fn.layout.shape))


def _statistics_of(apply: Apply) -> Callable[..., Tree]:
    def program(model: Tree, context: Any, batches: Tree) -> Tree:
        params, model_state = collectives.mean(model, context)
        floats, rest = _split(model_state)
        if any(jnp.finfo(x.dtype).bits < 32 for x in floats):
            raise ConfigurationError("statistics in half precision cannot be re-estimated")

        def one_worker(batches: Tree) -> _Leaves:
            def one_batch(sums: _Leaves, batch: Tree) -> tuple[_Leaves, None]:
                examples = fetch(context.data, batch)

                def after(floats: _Leaves) -> _Leaves:
                    before = _join(floats, rest)
                    moved = apply(params, before, examples)
                    check_same("the re-estimated model state", "the one before", before, moved)
                    return _split(moved)[0]

                of_batch = _batch_statistics(after, floats)
                return collectives.vary(jax.tree.map(jnp.add, sums, of_batch)), None

            zeros = collectives.vary(jax.tree.map(jnp.zeros_like, floats))
            sums, _ = lax.scan(one_batch, zeros, batches)
            return jax.tree.map(lambda x: x / len(jax.tree.leaves(batches)[0]), sums)

        per_worker = jax.tree.map(lambda b: jnp.moveaxis(b, 0, 2), batches)
        estimates = collectives.mean(over_workers(one_worker, "map")(per_worker), context)
        return jax.tree.map(
            lambda x, like: x[None, None].astype(like.dtype), _join(estimates, rest), model[1]
        )

    return program


def _batch_statistics(after: Callable[[_Leaves], _Leaves], before: _Leaves) -> _Leaves:
    """Solve s ← μ s + (1 − μ) b for b, from the updates of s and of two other values.

    Values that move in another way are returned unchanged.
    """
    shifted = lambda times: [s + times * jnp.maximum(1, jnp.abs(s)) for s in before]
    # By vmap the model is traced and compiled once: its layers do not depend on running statistics.
    three = jax.tree.map(lambda *values: jnp.stack(values), before, shifted(1), shifted(2))
    after_three = jax.vmap(after)(three)
    updates = ([x[n] for x in after_three] for n in range(3))
    return jax.tree.map(_batch_statistic, before, shifted(1), *updates)


def _batch_statistic(before: Any, shifted: Any, first: Any, second: Any, third: Any) -> jax.Array:
    kept = (second - first) / (shifted - before)  # μ
    size = jnp.abs(first) + jnp.abs(second) + jnp.abs(third)
    linear = jnp.abs(third - 2 * second + first) <= 1e-5 * size
    moves = linear & (kept > -1e-5) & (kept < 1 - 1e-5)  # μ = 0 up to rounding
    return jnp.where(moves, (first - kept * before) / jnp.where(moves, 1 - kept, 1), before)


def _split(tree: Tree) -> tuple[_Leaves, Tree]:
    """The floating-point leaves, and the tree with a placeholder for each of them."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    floats = [x for x in jax.tree.leaves(tree) if is_float(x)]
    return floats, jax.tree.map(lambda x: _FLOAT if is_float(x) else x, tree)


def _join(floats: _Leaves, rest: Tree) -> Tree:
    left = iter(floats)
    return jax.tree.map(lambda x: next(left) if x is _FLOAT else x, rest)


_FLOAT = object()
