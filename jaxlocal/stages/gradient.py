"""The gradient of one worker's loss, on its batch at once or in micro-batches."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.errors import ConfigurationError, check_integer
from jaxlocal.parallel.collectives import vary
from jaxlocal.parallel.leaves import describe, dtype_of, wide
from jaxlocal.parallel.sharding import shard_examples, unshard
from jaxlocal.types import Tree

GradFn = Callable[[Tree, Tree, Tree, jax.Array], tuple[Tree, Tree, dict[str, jax.Array]]]


def gradients(loss: Callable[..., Any], stateful: bool = False, gathered: bool = True) -> GradFn:
    """Make the gradient function of one worker from its loss.

    Args:
      loss: `loss(params, batch, key)` → scalar. The key is the worker's own at this step, for
        dropout and other noise. If `stateful`, `loss(params, model_state, batch, key)` → (scalar,
        (model_state, metrics)), where metrics is a dict of scalars.
      stateful: whether the model has model state, such as batch statistics, or reports metrics.
      gathered: for a worker that is sharded over devices. If true, each device gathers the
        parameters and takes its part of the batch, as FSDP does. If false, the loss is given
        sharded parameters; it gathers them where it needs them (`sharding.unshard`, of the
        parameters of a layer, for instance) or leaves that to the compiler.

    Returns:
      `grad_fn(params, model_state, batch, key)` → (gradients, model_state, metrics), where metrics
      has "loss".

    Raises:
      ConfigurationError: the loss takes other arguments; when it is called, it returns something
        else.

    >>> grad_fn = gradients(lambda params, batch, key: params * batch)
    >>> grads, model_state, metrics = grad_fn(2.0, {}, 3.0, None)
    >>> float(grads), float(metrics["loss"])
    (3.0, 6.0)
    """
    arguments = "(params, model_state, batch, key)" if stateful else "(params, batch, key)"
    if not takes(loss, 4 if stateful else 3):
        raise ConfigurationError(
            f"a loss must take {arguments} with stateful={stateful}, and {loss!r} does not"
        )
    gather = unshard if gathered else lambda tree: tree

    def grad_fn(params, model_state, batch, key):
        params, batch = gather(params), shard_examples(batch)
        given = (params, model_state, batch, key) if stateful else (params, batch, key)
        try:
            returned, grads = jax.value_and_grad(loss, has_aux=stateful)(*given)
        except TypeError:
            jax.eval_shape(lambda *given: _parts_of_loss(loss(*given), stateful)[0], *given)
            raise
        value, after, metrics = _parts_of_loss(returned, stateful)
        return gather(grads), after if stateful else model_state, {"loss": value, **metrics}

    return grad_fn


def accumulate(grad_fn: GradFn, micro_batches: int) -> GradFn:
    """Accumulate the gradient of a batch over micro-batches, one after another, to save memory.

    Gradients and metrics are means over the micro-batches: those of the whole batch where the loss
    is a mean over examples. Model state passes from one micro-batch to the next, and each has its
    own random key: batch normalisation takes the micro-batches as ghost batches, and normalises
    each by its own statistics.

    Args:
      grad_fn: as `gradients` makes it.
      micro_batches: into how many parts a batch is divided. Batches lead with the examples, whose
        number the parts must divide.

    Returns:
      A gradient function like `grad_fn`.

    Raises:
      ConfigurationError: fewer than one micro-batch, or, when it is called, a batch that they do
        not divide.

    >>> grad_fn = gradients(lambda w, batch, key: jnp.mean((w - batch) ** 2))
    >>> batch, key = jnp.array([1.0, 2.0, 3.0, 6.0]), jax.random.key(0)
    >>> [float(f(0.0, {}, batch, key)[0]) for f in (grad_fn, accumulate(grad_fn, 2))]
    [-6.0, -6.0]
    """
    check_integer("micro-batches", micro_batches)
    traced_once = jax.jit(grad_fn, inline=True)  # for its shapes and in the loop

    def accumulated(params, model_state, batch, key):
        parts = jax.tree.map(lambda x: _parts(x, micro_batches), batch)

        def add(carry, part):
            sums, state = carry
            number, examples = part
            part_key = jax.random.fold_in(key, number)
            grads, state, metrics = traced_once(params, state, examples, part_key)
            sums = jax.tree.map(lambda s, x: s + jnp.asarray(x, s.dtype), sums, (grads, metrics))
            return vary((sums, state)), None

        first = jax.tree.map(lambda x: x[0], parts)
        grads, _, metrics = jax.eval_shape(traced_once, params, model_state, first, key)
        zeros = lambda x: jnp.zeros(x.shape, wide(x.dtype))
        start = vary((jax.tree.map(zeros, (grads, metrics)), model_state))
        (sums, model_state), _ = lax.scan(add, start, (jnp.arange(micro_batches), parts))
        means, metrics = jax.tree.map(lambda total: total / micro_batches, sums)
        return jax.tree.map(lambda g, x: g.astype(x.dtype), means, grads), model_state, metrics

    return grad_fn if micro_batches == 1 else accumulated


def takes(fn: Any, count: int) -> bool:
    """Whether a function takes so many arguments by position, as far as its signature shows it.

    >>> takes(lambda params, batch, key: 0, 3), takes(lambda params, batch: 0, 3), takes(None, 3)
    (True, False, False)
    """
    if not callable(fn):
        return False
    try:
        inspect.signature(fn).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # no signature, as some functions written in C
        pass
    return True


def check_metrics(metrics: Any, reserved: Iterable[str] = ("active",)) -> None:
    """Check that metrics are real scalars by name.

    Args:
      metrics: what a loss reports.
      reserved: the names that it may not take.

    Raises:
      ConfigurationError: it is no dictionary of scalars, or has a reserved name.

    >>> check_metrics({"accuracy": jnp.ones(3)})
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: metrics must be real numbers of shape [], and 'accuracy' is
    float32[3]
    """
    if not isinstance(metrics, Mapping):
        raise ConfigurationError(
            f"metrics must be a dictionary of scalars by name, got {describe(metrics)}"
        )
    for name, value in metrics.items():
        if name in reserved:
            raise ConfigurationError(
                f"a metric may not be called {name!r}, under which jaxlocal itself reports"
            )
        if not isinstance(name, str) or not _is_real_scalar(value):
            raise ConfigurationError(
                f"metrics must be real numbers of shape [], and {name!r} is {describe(value)}"
            )


def _scalar(value: Any) -> Any:
    """The value of a loss, if it is one."""
    if isinstance(value, tuple | list):
        raise ConfigurationError(
            f"a loss must return a scalar, got a {type(value).__name__} of {len(value)}; with "
            f"gradients(loss, stateful=True) it may return (scalar, (model_state, metrics))"
        )
    dtype = dtype_of(value)
    if dtype is None or jnp.shape(value) or not jnp.issubdtype(dtype, jnp.floating):
        raise ConfigurationError(
            f"a loss must return a real floating-point number of shape [], such as the mean over "
            f"its examples, got {describe(value)}"
        )
    return value


def _parts_of_loss(returned: Any, stateful: bool) -> tuple[Any, Tree, dict[str, Any]]:
    """The value, the model state and the metrics, if these are what a loss returned."""
    if not stateful:
        return _scalar(returned), {}, {}
    pair = lambda x: isinstance(x, tuple | list) and len(x) == 2
    if not (pair(returned) and pair(returned[1])):
        got = type(returned).__name__
        if isinstance(returned, tuple | list):
            got = f"({', '.join(type(x).__name__ for x in returned)})"
        raise ConfigurationError(
            f"a loss with stateful=True must return (scalar, (model_state, metrics)), got {got}"
        )
    value, (model_state, metrics) = returned
    check_metrics(metrics, reserved=("loss", "active"))
    return _scalar(value), model_state, metrics


def _is_real_scalar(x: Any) -> bool:
    dtype = dtype_of(x)
    if dtype is None or jnp.shape(x):
        return False
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _parts(examples: jax.Array, count: int) -> jax.Array:
    if examples.ndim == 0 or len(examples) % count:
        size = len(examples) if examples.ndim else "one value without a batch axis"
        raise ConfigurationError(f"a batch of {size} does not divide into {count} micro-batches")
    return examples.reshape(count, -1, *examples.shape[1:])
