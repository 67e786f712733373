"""Losses and metrics of a model for classification and regression, in training and evaluation."""

import functools
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.adapters import Model
from jaxlocal.models.soft_targets import (
    before,
    check_soft_targets,
    mix,
    mixing_share,
    uniform_cross_entropy,
)
from jaxlocal.parallel.leaves import check_fits, wide

Tree = Any
# (params, model_state, batch, key) -> (loss, (model_state, metrics))
Loss = Callable[[Tree, Tree, Tree, jax.Array | None], tuple[jax.Array, tuple[Tree, Tree]]]
Metrics = Callable[[Tree, Tree, Tree], dict[str, jax.Array]]
Normalize = Callable[[Any], Any]  # stored inputs -> inputs of the model


def example_metrics(outputs: jax.Array, targets: jax.Array, classes: int) -> dict[str, jax.Array]:
    """Loss of each example, and for classification also its accuracy.

    The loss is half the squared error for regression, the sigmoid cross-entropy for two classes
    with one logit, and the softmax cross-entropy otherwise. The metrics of a sequence are means
    over its positions. The loss of an example whose class is not from 0 to classes - 1 is NaN, at
    which a run stops, and its accuracy is false; no class means that an example is ignored.

    Args:
      outputs: predictions [batch] of regression; logits [batch] of two classes, [batch, classes]
        of more, or [batch, length, classes] of sequences.
      targets: values [batch] of regression; classes, integers [batch], or [batch, length] of
        sequences.
      classes: number of classes; 0 for regression.

    Returns:
      {"loss": [batch]} for regression, {"loss": [batch], "accuracy": [batch]} for classification.

    Raises:
      ConfigurationError: the outputs are not one array, their shape does not fit the targets and
        classes, or the classes are not integers.

    >>> example_metrics(jnp.array([2.0]), jnp.array([1.0]), classes=0)["loss"]
    Array([0.5], dtype=float32)
    """
    check_classes(classes)
    _check_arrays(outputs, targets, classes)
    check_fits("targets", targets)
    outputs = outputs.astype(wide(outputs.dtype))
    if classes == 0:
        dtype = max(outputs.dtype, wide(targets.dtype), key=lambda kind: kind.itemsize)
        return _of_examples({"loss": optax.l2_loss(outputs.astype(dtype), targets.astype(dtype))})
    labels = targets.astype(jax.dtypes.canonicalize_dtype(jnp.int64))  # uint8 has no 300
    valid = (labels >= 0) & (labels < classes)
    if outputs.shape == labels.shape:
        loss = optax.sigmoid_binary_cross_entropy(outputs, labels.astype(outputs.dtype))
        right = (outputs > 0) == (labels == 1)
    else:
        loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        right = outputs.argmax(-1).astype(labels.dtype) == labels
    return _of_examples({"loss": jnp.where(valid, loss, jnp.nan), "accuracy": right & valid})


def check_classes(classes: Any) -> None:
    """Check a number of classes.

    Raises:
      ConfigurationError: it is neither 0, for regression, nor an integer of 2 or more.

    >>> check_classes(10)
    """
    if (
        isinstance(classes, bool)
        or not isinstance(classes, Integral)
        or classes < 0
        or classes == 1
    ):
        raise ConfigurationError(
            f"classes must be 0 for regression, or their number of 2 or more, got {classes!r}"
        )


def _of_examples(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The metrics of each example, [batch], of those of each of its positions."""
    each = lambda v: v if v.ndim == 1 else v.mean(tuple(range(1, v.ndim)))
    return {name: each(value) for name, value in metrics.items()}


def _check_arrays(outputs: Any, targets: Any, classes: int) -> None:
    for name, value in {"outputs": outputs, "targets": targets}.items():
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            raise ConfigurationError(
                f"the {name} of a loss must be one array, got {type(value).__name__}; make a loss "
                "of your own for others"
            )
    wanted = (np.integer, np.bool_) if classes else (np.integer, np.floating, np.bool_)
    if jnp.issubdtype(outputs.dtype, np.complexfloating):
        raise ConfigurationError(f"outputs must be real numbers, got {outputs.dtype}")
    if not any(jnp.issubdtype(targets.dtype, kind) for kind in wanted):
        numbers = f"integers from 0 to {classes - 1}" if classes else "numbers"
        raise ConfigurationError(f"targets must be {numbers}, got {targets.dtype}")
    _check_shapes(outputs.shape, targets.shape, classes)


def _check_shapes(outputs: tuple[int, ...], targets: tuple[int, ...], classes: int) -> None:
    one_number = outputs == targets and len(targets) > 0 and classes in (0, 2)
    logits = 0 < len(targets) < len(outputs) and classes > 0
    logits = logits and outputs[:-1] == targets and outputs[-1] >= classes
    if not (one_number or logits):
        wanted = [targets] * (classes in (0, 2)) + [(*targets, classes)] * (classes > 0)
        raise ConfigurationError(
            f"outputs of shape {outputs} do not fit targets of shape {targets} with {classes} "
            f"classes: outputs of shape {' or '.join(map(str, wanted))} would"
        )


def training_loss(
    model: Model,
    normalize: Normalize,
    classes: int,
    *,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
) -> Loss:
    """Make the loss of a model for `jaxlocal.gradients(..., stateful=True)`: the mean over a batch.

    Batches are {"inputs": [batch, ...], "targets": [batch]}, or for sequences {"inputs": [batch,
    length], "targets": [batch, length]}. With label smoothing ε and mixup of λ ~ Beta(α, α) it is

        mean_n λ ℓ_ε(x̃_n, y_n) + (1 − λ) ℓ_ε(x̃_n, y_{n−1}),  where x̃_n = λ x_n + (1 − λ) x_{n−1}
        and ℓ_ε(x, y) = (1 − ε) ℓ(x, y) + ε Σ_c ℓ(x, c) / classes

    for the examples x_n of classes y_n and the cross-entropy ℓ. λ is drawn from the key: one for
    each worker, step and micro-batch. `evaluation_metrics` knows neither.

    Args:
      model: the model.
      normalize: `normalize(inputs)` makes the model's inputs of stored ones, such as uint8 images.
        It runs in the compiled step, so that a device stores and moves the smaller dtype. It has
        to leave tokens as they are.
      classes: number of classes; 0 for regression. `example_metrics` describes the losses.
      label_smoothing: ε, in [0, 1).
      mixup: α ≥ 0; 0 for none.

    Returns:
      `loss(params, model_state, batch, key)`, which gives (loss, (model_state, {})).

    Raises:
      ConfigurationError: an ε or α out of its range or for a regression; when the loss is called,
        mixup of tokens, of a single example or without a key.

    Sources: label smoothing, Szegedy et al., CVPR 2016, https://arxiv.org/abs/1512.00567; mixup,
    Zhang et al., ICLR 2018, https://arxiv.org/abs/1710.09412. Differs from the paper of mixup in:
    an example is mixed with the one before it, not with a random one; batches are in random order.

    >>> from jaxlocal.models import build
    >>> model = build("logistic", (3,), outputs=1)
    >>> loss = training_loss(model, lambda inputs: inputs / 255, classes=2)
    >>> params, model_state = model.init(jax.random.key(0))
    >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.array([0, 1, 1, 0])}
    >>> value, (model_state, metrics) = loss(params, model_state, batch, None)
    >>> round(float(value), 4)  # log 2: all weights start at zero
    0.6931
    """
    check_classes(classes)
    check_soft_targets(classes, label_smoothing, mixup)
    losses = functools.partial(_smoothed, classes=classes, label_smoothing=label_smoothing)

    def loss(
        params: Tree, model_state: Tree, batch: Tree, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[Tree, Tree]]:
        raw, targets = of_batch(batch)
        inputs = normalize(raw)
        if mixup:
            share, key = mixing_share(mixup, key)
            inputs, others = mix(inputs, share), before(targets)
        outputs, model_state = model.apply(params, model_state, inputs, key, True)
        values = losses(outputs, targets)
        if mixup:
            share = share.astype(values.dtype)
            values = share * values + (1 - share) * losses(outputs, others)
        return values.mean(), (model_state, {})

    return loss


def _smoothed(
    outputs: jax.Array, targets: jax.Array, classes: int, label_smoothing: float
) -> jax.Array:
    """The loss of each example, where another class than its own has the chance ε / classes."""
    losses = example_metrics(outputs, targets, classes)["loss"]
    if not label_smoothing:
        return losses
    uniform = _of_examples({"loss": uniform_cross_entropy(outputs, targets, classes)})["loss"]
    return (1 - label_smoothing) * losses + label_smoothing * uniform


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
    check_classes(classes)

    def metrics(params: Tree, model_state: Tree, batch: Tree) -> dict[str, jax.Array]:
        inputs, targets = of_batch(batch)
        outputs, _ = model.apply(params, model_state, normalize(inputs), None, False)
        return example_metrics(outputs, targets, classes)

    return metrics


def of_batch(batch: Any) -> tuple[Any, Any]:
    """The inputs and targets of a batch.

    >>> of_batch({"inputs": 1, "targets": 2})
    (1, 2)
    """
    names = sorted(map(str, batch)) if isinstance(batch, Mapping) else [type(batch).__name__]
    if not {"inputs", "targets"} <= set(names):
        raise ConfigurationError(
            f'a batch of this loss must be a dictionary of "inputs" and "targets", got '
            f"{', '.join(names) or 'an empty one'}"
        )
    return batch["inputs"], batch["targets"]
