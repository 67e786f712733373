"""What a worker's gradient is: of its loss, at once or in parts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.collectives import vary
from jaxlocal.parallel.sharding import shard_examples, unshard
from jaxlocal.types import Tree

GradFn = Callable[[Tree, Tree, Tree, jax.Array], tuple[Tree, Tree, dict[str, jax.Array]]]


def gradients(loss: Callable, stateful: bool = False, gathered: bool = True) -> GradFn:
    """The gradient function of one worker, from its loss.

    Args:
      loss: `loss(params, batch, key)` → scalar. The key is the worker's own at this step, for
        dropout and the like. If `stateful`, `loss(params, model_state, batch, key)` → (scalar,
        (model_state, metrics)), metrics being a dict of scalars.
      gathered: where a worker is split over devices, whether each of them gathers the parameters
        and takes its part of the batch, as FSDP does. Else the loss is handed parameters in parts,
        and says itself what is gathered where (`sharding.unshard`, of a layer's parameters, say) or
        leaves it to the compiler.

    Returns:
      `grad_fn(params, model_state, batch, key)` → (gradients, model_state, metrics with "loss"
      among them).

    >>> grad_fn = gradients(lambda params, batch, key: params * batch)
    >>> [float(x) for x in (grad_fn(2.0, {}, 3.0, None)[0], grad_fn(2.0, {}, 3.0, None)[2]["loss"])]
    [3.0, 6.0]
    """

    def of_whole(params, *rest):
        return loss(unshard(params) if gathered else params, *rest)

    def grad_fn(params, model_state, batch, key):
        batch = shard_examples(batch)
        if stateful:
            (value, (model_state, metrics)), grads = jax.value_and_grad(of_whole, has_aux=True)(
                params, model_state, batch, key
            )
        else:
            (value, grads), metrics = jax.value_and_grad(of_whole)(params, batch, key), {}
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
