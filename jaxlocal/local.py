"""The local step: every worker takes a gradient on its own batch and an optimizer step of its
own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxlocal.errors import ConfigurationError, lookup
from jaxlocal.types import Info, Messages, Mixer, Stage, Tree
from jaxlocal.workers import (
    GRADIENT,
    RATE,
    WORKER_MAPS,
    over_workers,
    spread,
    stream,
    vary,
    worker_map_for,
)

GradFn = Callable[[Tree, Tree, Tree, jax.Array], tuple[Tree, Tree, dict[str, jax.Array]]]


def gradients(loss: Callable, stateful: bool = False) -> GradFn:
    """The gradient function of one worker, from its loss.

    Args:
      loss: `loss(params, batch, key)` → scalar. The key is the worker's own at this tick, for
        dropout and the like. If `stateful`, `loss(params, model_state, batch, key)` → (scalar,
        (model_state, metrics)), metrics being a dict of scalars.

    Returns:
      `grad_fn(params, model_state, batch, key)` → (gradients, model_state, metrics with "loss"
      among them).

    >>> grad_fn = gradients(lambda params, batch, key: params * batch)
    >>> [float(x) for x in (grad_fn(2.0, {}, 3.0, None)[0], grad_fn(2.0, {}, 3.0, None)[2]["loss"])]
    [3.0, 6.0]
    """

    def grad_fn(params, model_state, batch, key):
        if stateful:
            (value, (model_state, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(
                params, model_state, batch, key
            )
        else:
            (value, grads), metrics = jax.value_and_grad(loss)(params, batch, key), {}
        return grads, model_state, {"loss": value, **metrics}

    return grad_fn


def accumulate(grad_fn: GradFn, micro_batches: int) -> GradFn:
    """The gradient of a worker's batch taken in so many parts, one after another, to save memory.

    Gradients and metrics are means over the parts; where the loss is a mean over examples they are
    those of the whole batch. What the model keeps is handed from part to part, and each part has a
    random key of its own. Batches lead with the examples, in a number that the parts divide.

    >>> grad_fn = gradients(lambda w, batch, key: jnp.mean((w - batch) ** 2))
    >>> batch, key = jnp.array([1.0, 2.0, 3.0, 6.0]), jax.random.key(0)
    >>> [float(f(0.0, {}, batch, key)[0]) for f in (grad_fn, accumulate(grad_fn, 2))]
    [-6.0, -6.0]
    """
    if micro_batches < 1:
        raise ConfigurationError(f"micro-batches must be at least 1, got {micro_batches}")

    def accumulated(params, model_state, batch, key):
        parts = jax.tree.map(lambda x: _parts(x, micro_batches), batch)

        def add(carry, part):
            sums, state = carry
            number, examples = part
            part_key = jax.random.fold_in(key, number)
            grads, state, metrics = grad_fn(params, state, examples, part_key)
            sums = jax.tree.map(lambda s, x: s + jnp.asarray(x, s.dtype), sums, (grads, metrics))
            return vary((sums, state)), None

        first = jax.tree.map(lambda x: x[0], parts)
        grads, _, metrics = jax.eval_shape(grad_fn, params, model_state, first, key)
        wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
        start = vary((jax.tree.map(wide, (grads, metrics)), model_state))
        (sums, model_state), _ = lax.scan(add, start, (jnp.arange(micro_batches), parts))
        means, metrics = jax.tree.map(lambda total: total / micro_batches, sums)
        return jax.tree.map(lambda g, x: g.astype(x.dtype), means, grads), model_state, metrics

    return grad_fn if micro_batches == 1 else accumulated


def _parts(examples: jax.Array, count: int) -> jax.Array:
    if examples.ndim == 0 or len(examples) % count:
        size = len(examples) if examples.ndim else "one value without a batch axis"
        raise ConfigurationError(f"a batch of {size} does not divide into {count} micro-batches")
    return examples.reshape(count, -1, *examples.shape[1:])


def scale_by_tick(schedule: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """An optax step of −η_t where t is the run's tick, not the number of steps that this worker has
    taken.

    The two differ where workers skip ticks by their rates. Ends a chain, as
    `optax.scale_by_learning_rate` does.

    >>> step = scale_by_tick(lambda tick: 0.1 / (1 + tick))
    >>> round(float(step.update(jnp.ones(()), step.init(None), tick=1)[0]), 3)
    -0.05
    """

    def update(updates, state, params=None, *, tick, **others):
        rate = schedule(tick) if callable(schedule) else schedule
        return jax.tree.map(lambda u: (-rate * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def tick(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    gradient_mixer: Mixer | None = None,
    worker_map: str | None = None,
) -> Stage:
    """One tick: each worker i takes x_i ← optimizer(x_i, g_i) with probability p_i, else it stays.

    With a gradient mixer the gradients are averaged before the optimizer, every worker takes the
    step, and a worker that skips its tick contributes a gradient of zero.

    Args:
      grad_fn: as `gradients` makes it; batches of indices are looked up in `world.data` before it
        is called.
      optimizer: any optax transformation; mapped over workers, so that norms are a worker's own. It
        is told the tick, and the loss and gradient as `value` and `grad`.
      worker_map: "vmap" or "map"; by default what is fast for this function on this backend.

    Reports per worker "active" (1 where it took its step) and the metrics of grad_fn (0 where it
    did not).
    """
    if worker_map is not None:
        lookup("worker map", worker_map, WORKER_MAPS)
    update_fn = optax.with_extra_args_support(optimizer).update

    def apply(state, memory, batches, world):
        batch = jax.tree.map(lambda b: b[0], batches)
        one = _one_worker(grad_fn, update_fn, state, world)
        arguments = (state.params, state.model_state, batch, world.worker)
        mode = worker_map or worker_map_for(
            one.gradient, *jax.tree.map(lambda x: x[0, 0], arguments)
        )
        if gradient_mixer is None:
            return _local_step(one, state, memory, batch, world, mode)
        return _averaged_step(one, state, memory, batch, world, mode, gradient_mixer)

    def traffic(state, layout):
        return gradient_mixer.messages(bits(state.params), layout) if gradient_mixer else Messages()

    return Stage(lambda state: (), apply, 1, traffic)


class _OneWorker(NamedTuple):
    """What a worker does at this tick."""

    gradient: Callable  # (params, model_state, batch, worker) -> (grads, model_state, metrics)
    update: Callable  # (grads, opt_state, params, loss) -> (params, opt_state)
    active: Callable  # (worker, rate) -> whether it takes its step; True where all always do


def _one_worker(grad_fn, update_fn, state, world) -> _OneWorker:
    def gradient(params, model_state, batch, worker):
        key = stream(state.key, GRADIENT, state.tick, worker)
        return grad_fn(params, model_state, fetch(world.data, batch), key)

    def update(grads, opt_state, params, loss):
        told = {"tick": state.tick, "value": loss, "grad": grads}
        updates, opt_state = update_fn(grads, opt_state, params, **told)
        return optax.apply_updates(params, updates), opt_state

    def active(worker, rate):
        if rate is None:
            return True
        key = stream(state.key, RATE, state.tick, worker)
        return jax.random.uniform(key, dtype=rate.dtype) < rate

    return _OneWorker(gradient, update, active)


def _local_step(one, state, memory, batch, world, mode):
    """Gradient and update in one pass over the workers, so that a loop keeps one gradient alive."""

    def step(params, opt_state, model_state, batch, worker, rate):
        on = one.active(worker, rate)

        def take():
            grads, new_state, metrics = one.gradient(params, model_state, batch, worker)
            new_params, new_opt_state = one.update(grads, opt_state, params, metrics.get("loss"))
            return vary((new_params, new_opt_state, new_state, {**metrics, "active": jnp.ones(())}))

        def stay():
            metrics = jax.eval_shape(take)[3]
            nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), metrics)
            return vary((params, opt_state, model_state, nothing))

        if on is True:
            return take()
        if mode == "vmap":  # under vmap a cond runs both branches anyway
            return jax.tree.map(lambda a, b: jnp.where(on, a, b), take(), stay())
        return lax.cond(on, take, stay)

    stepped = over_workers(step, mode)(
        state.params, state.opt_state, state.model_state, batch, world.worker, world.rate
    )
    return _advance(state, memory, *stepped)


def _averaged_step(one, state, memory, batch, world, mode, mixer):
    """All gradients, their average, all updates: the collective stays outside of any cond."""

    def masked(params, model_state, batch, worker, rate):
        grads, new_state, metrics = one.gradient(params, model_state, batch, worker)
        on = jnp.asarray(one.active(worker, rate))
        mask = lambda x: jnp.where(on, x, jnp.zeros_like(x))
        new_state = jax.tree.map(lambda new, old: jnp.where(on, new, old), new_state, model_state)
        metrics = {**jax.tree.map(mask, metrics), "active": on.astype(jnp.float32)}
        return jax.tree.map(mask, grads), new_state, metrics

    grads, model_state, metrics = over_workers(masked, mode)(
        state.params, state.model_state, batch, world.worker, world.rate
    )
    told = (grads, metrics.get("loss"))
    grads, loss = spread(mixer.average(told, world), told)
    params, opt_state = over_workers(one.update, mode)(grads, state.opt_state, state.params, loss)
    return _advance(state, memory, params, opt_state, model_state, metrics)


def _advance(state, memory, params, opt_state, model_state, metrics):
    tick = state.tick + 1
    state = state._replace(params=params, opt_state=opt_state, model_state=model_state, tick=tick)
    return state, memory, Info(worker={name: value[None] for name, value in metrics.items()})


def fetch(data: Tree, batch: Tree) -> Tree:
    """The examples of a batch: the batch itself, or, where there is a pool, those that its
    indices point to. A dictionary has them as its "index", and its other entries stay beside the
    examples."""
    if not jax.tree.leaves(data):
        return batch
    if not isinstance(batch, dict):
        return jax.tree.map(lambda pool: pool[batch], data)
    beside = {name: value for name, value in batch.items() if name != "index"}
    return {**jax.tree.map(lambda pool: pool[batch["index"]], data), **beside}


def bits(stacked: Any) -> int:
    """The size of one worker's tree in bits; leaves (or their shapes) are [D, N, ...]."""
    return sum(
        8 * x.dtype.itemsize * (x.size // (x.shape[0] * x.shape[1]))
        for x in jax.tree.leaves(stacked)
    )
