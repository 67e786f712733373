"""From a model and a dataset to what training asks for: a loss to differentiate, and metrics of
examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.adapters import Model

Tree = Any


def example_metrics(outputs: jax.Array, targets: jax.Array, classes: int) -> dict[str, jax.Array]:
    """Loss, and for classes accuracy, of each example; of a sequence, the means over its places.

    Args:
      outputs: logits [batch, classes], [batch] for two classes, or predictions [batch]; logits
        [batch, length, classes] of sequences.
      targets: [batch], classes or values; classes [batch, length] of sequences.
      classes: 0 for regression, whose loss is half the squared error; for two classes with one
        logit the sigmoid cross-entropy, otherwise the softmax cross-entropy.

    Raises:
      ConfigurationError: outputs of a shape that is not one of these.

    >>> example_metrics(jnp.array([2.0]), jnp.array([1.0]), classes=0)["loss"]
    Array([0.5], dtype=float32)
    """
    _check_shapes(outputs.shape, targets.shape, classes)
    outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    if classes == 0:
        return {"loss": optax.l2_loss(outputs, targets)}
    if outputs.ndim == 1:
        loss = optax.sigmoid_binary_cross_entropy(outputs, targets)
        return {"loss": loss, "accuracy": (outputs > 0) == (targets == 1)}
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    metrics = {"loss": loss, "accuracy": outputs.argmax(-1) == targets}
    return metrics if loss.ndim == 1 else {name: v.mean(1) for name, v in metrics.items()}


def _check_shapes(outputs: tuple[int, ...], targets: tuple[int, ...], classes: int) -> None:
    one = outputs == targets and classes in (0, 2)
    logits = classes > 0 and outputs[:-1] == targets and outputs[-1] >= max(2, classes)
    if not (one or logits):
        wanted = [targets] * (classes in (0, 2)) + [(*targets, classes)] * (classes > 0)
        raise ConfigurationError(
            f"outputs of shape {outputs} do not fit targets of shape {targets} of {classes} "
            f"classes; {' or '.join(map(str, wanted))} would"
        )


def training_loss(
    model: Model, normalize: Callable[[jax.Array], jax.Array], classes: int
) -> Callable:
    """The loss for `jaxlocal.gradients(..., stateful=True)`: the mean over a batch's examples.

    Args:
      model: what gives the outputs.
      normalize: from stored inputs (uint8 images, say) to what enters the model; it runs in the
        step, so that what is stored and moved stays small. Tokens it has to leave alone.
      classes: see `example_metrics`. Batches are {"inputs": [batch, ...], "targets": [batch]}, of
        sequences [batch, length].
    """

    def loss(params: Tree, model_state: Tree, batch: Tree, key: jax.Array):
        inputs = normalize(batch["inputs"])
        outputs, model_state = model.apply(params, model_state, inputs, key, True)
        values = example_metrics(outputs, batch["targets"], classes)["loss"]
        return values.mean(), (model_state, {})

    return loss


def evaluation_metrics(
    model: Model, normalize: Callable[[jax.Array], jax.Array], classes: int
) -> Callable[[Tree, Tree, Tree], dict[str, jax.Array]]:
    """The metrics for `jaxlocal.evaluation.Evaluation`: `example_metrics` of the model at rest."""

    def metrics(params: Tree, model_state: Tree, batch: Tree) -> dict[str, jax.Array]:
        outputs, _ = model.apply(params, model_state, normalize(batch["inputs"]), None, False)
        return example_metrics(outputs, batch["targets"], classes)

    return metrics
