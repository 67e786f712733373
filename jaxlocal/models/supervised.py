"""Losses and metrics of a model for classification and regression, in training and evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.adapters import Model

Tree = Any
# (params, model_state, batch, key) -> (loss, (model_state, metrics))
Loss = Callable[[Tree, Tree, Tree, jax.Array | None], tuple[jax.Array, tuple[Tree, Tree]]]
Metrics = Callable[[Tree, Tree, Tree], dict[str, jax.Array]]
Normalize = Callable[[Any], Any]  # stored inputs -> inputs of the model


def example_metrics(outputs: jax.Array, targets: jax.Array, classes: int) -> dict[str, jax.Array]:
    """Loss of each example, and for classification also its accuracy.

    The loss is half the squared error for regression, the sigmoid cross-entropy for two classes
    with one logit, and the softmax cross-entropy otherwise. The metrics of a sequence are means
    over its positions.

    Args:
      outputs: predictions [batch] of regression; logits [batch] of two classes, [batch, classes]
        of more, or [batch, length, classes] of sequences.
      targets: values [batch] of regression; classes, integers [batch], or [batch, length] of
        sequences.
      classes: number of classes; 0 for regression.

    Returns:
      {"loss": [batch]} for regression, {"loss": [batch], "accuracy": [batch]} for classification.

    Raises:
      ConfigurationError: the shape of the outputs does not fit the targets and classes.

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
    one_number = outputs == targets and classes in (0, 2)
    logits = classes > 0 and outputs[:-1] == targets and outputs[-1] >= max(2, classes)
    if not (one_number or logits):
        wanted = [targets] * (classes in (0, 2)) + [(*targets, classes)] * (classes > 0)
        raise ConfigurationError(
            f"outputs of shape {outputs} do not fit targets of shape {targets} with {classes} "
            f"classes: outputs of shape {' or '.join(map(str, wanted))} would"
        )


def training_loss(model: Model, normalize: Normalize, classes: int) -> Loss:
    """Make the loss of a model for `jaxlocal.gradients(..., stateful=True)`: the mean over a batch.

    Batches are {"inputs": [batch, ...], "targets": [batch]}, or for sequences {"inputs": [batch,
    length], "targets": [batch, length]}.

    Args:
      model: the model.
      normalize: `normalize(inputs)` makes the model's inputs of stored ones, such as uint8 images.
        It runs in the compiled step, so that a device stores and moves the smaller dtype. It has
        to leave tokens as they are.
      classes: number of classes; 0 for regression. `example_metrics` describes the losses.

    Returns:
      `loss(params, model_state, batch, key)`, which gives (loss, (model_state, {})).

    >>> from jaxlocal.models import build
    >>> model = build("logistic", (3,), outputs=1)
    >>> loss = training_loss(model, lambda inputs: inputs / 255, classes=2)
    >>> params, model_state = model.init(jax.random.key(0))
    >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.array([0, 1, 1, 0])}
    >>> value, (model_state, metrics) = loss(params, model_state, batch, None)
    >>> round(float(value), 4)  # log 2: all weights start at zero
    0.6931
    """

    def loss(
        params: Tree, model_state: Tree, batch: Tree, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[Tree, Tree]]:
        inputs = normalize(batch["inputs"])
        outputs, model_state = model.apply(params, model_state, inputs, key, True)
        values = example_metrics(outputs, batch["targets"], classes)["loss"]
        return values.mean(), (model_state, {})

    return loss


def evaluation_metrics(model: Model, normalize: Normalize, classes: int) -> Metrics:
    """Make the metrics of a model for `jaxlocal.evaluation.Evaluation`: loss and accuracy.

    The model is applied with `train=False`, so without dropout and with running statistics.

    Args:
      model, normalize, classes: as for `training_loss`.

    Returns:
      `metrics(params, model_state, batch)`, which gives the `example_metrics` of a batch.

    >>> from jaxlocal.models import build
    >>> model = build("logistic", (3,), outputs=1)
    >>> metrics = evaluation_metrics(model, lambda inputs: inputs / 255, classes=2)
    >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.array([0, 1, 1, 0])}
    >>> metrics(*model.init(jax.random.key(0)), batch)["accuracy"]
    Array([ True, False, False,  True], dtype=bool)
    """

    def metrics(params: Tree, model_state: Tree, batch: Tree) -> dict[str, jax.Array]:
        outputs, _ = model.apply(params, model_state, normalize(batch["inputs"]), None, False)
        return example_metrics(outputs, batch["targets"], classes)

    return metrics
