"""Targets that are distributions over the classes: label smoothing, and mixup of examples."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.leaves import describe, wide

Tree = Any


def check_soft_targets(classes: int, label_smoothing: Any, mixup: Any) -> None:
    """Check the options by which targets become distributions over the classes.

    Raises:
      ConfigurationError: a label smoothing that is not in [0, 1), a mixup that is not a number
        ≥ 0, or one of them for a regression.

    >>> check_soft_targets(10, label_smoothing=0.1, mixup=0.2)
    """
    if not (_is_number(label_smoothing) and 0 <= label_smoothing < 1):
        raise ConfigurationError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
    if not (_is_number(mixup) and 0 <= mixup < math.inf):
        raise ConfigurationError(f"mixup must be a number α ≥ 0, got {mixup!r}")
    for name, value in {"label_smoothing": label_smoothing, "mixup": mixup}.items():
        if value and classes == 0:
            raise ConfigurationError(
                f"{name}={value} is for classification, and classes=0 is a regression"
            )


def uniform_cross_entropy(outputs: jax.Array, targets: jax.Array, classes: int) -> jax.Array:
    """Cross-entropy of each output to the uniform distribution over the classes.

    Args:
      outputs: logits [batch] of two classes, [batch, ..., logits] otherwise; what they are is told
        by the shape of the targets.
      targets: classes [batch, ...], of which only the shape is read.
      classes: their number, at most that of the logits.

    Returns:
      An array of the shape of the targets.

    >>> uniform_cross_entropy(jnp.zeros((2, 4)), jnp.zeros(2, int), 4)  # log 4
    Array([1.3862944, 1.3862944], dtype=float32)
    """
    outputs = outputs.astype(wide(outputs.dtype))
    if outputs.shape == targets.shape:
        return optax.sigmoid_binary_cross_entropy(outputs, jnp.full_like(outputs, 0.5))
    return jax.nn.logsumexp(outputs, axis=-1) - outputs[..., :classes].mean(-1)


def mixing_share(mixup: float, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Draw mixup's share λ ~ Beta(α, α), one for a batch.

    Args:
      mixup: α.
      key: of a worker at a step.

    Returns:
      (λ, float32 [], a key for what else the step draws).

    Raises:
      ConfigurationError: there is no key.
    """
    if key is None:
        raise ConfigurationError(f"mixup={mixup} draws from the key of a loss, and got None")
    own, key = jax.random.split(key)
    return jax.random.beta(own, mixup, mixup, dtype=jnp.float32), key


def mix(inputs: Tree, share: jax.Array) -> Tree:
    """Mix every example with the one before it in the batch: x_n ← λ x_n + (1 − λ) x_{n−1}.

    Args:
      inputs: of a model, leaves [batch, ...]; the first example is mixed with the last.
      share: λ.

    Raises:
      ConfigurationError: inputs that are not floating-point numbers, as tokens are, or a batch of
        fewer than two examples.

    >>> mix(jnp.array([0.0, 1.0, 4.0]), jnp.float32(0.75))
    Array([1.  , 0.75, 3.25], dtype=float32)
    """

    def one(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ConfigurationError(
                f"mixup mixes inputs that are floating-point numbers, which tokens are not, got "
                f"{describe(x)}"
            )
        if len(x) < 2:
            raise ConfigurationError(f"mixup mixes the examples of a batch, which has {len(x)}")
        part = share.astype(x.dtype)
        return part * x + (1 - part) * before(x)

    return jax.tree.map(one, inputs)


def before(examples: jax.Array) -> jax.Array:
    """For every example the one before it in the batch; for the first one the last.

    >>> before(jnp.array([1, 2, 3]))
    Array([3, 1, 2], dtype=int32)
    """
    return jnp.roll(examples, 1, axis=0)


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)
