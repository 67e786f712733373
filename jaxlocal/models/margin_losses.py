"""Losses of linear classifiers by the margin: the perceptron loss and the squared hinge.

With y = -1 for class 0 and y = 1 for class 1, an example with the logit f has the margin m = y f.

| name | loss | |
|---|---|---|
| `perceptron` | max(0, -m) | an example on the boundary, m = 0, counts as a mistake |
| `squared_hinge` | max(0, 1 - m)² | smooth |

Both are convex, and zero where every margin is large enough: on separable data one model minimises
the loss of every example.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlocal.errors import ConfigurationError, lookup
from jaxlocal.models.adapters import Model
from jaxlocal.models.supervised import Loss, Metrics, Normalize, example_metrics, of_batch
from jaxlocal.parallel.leaves import wide


def _perceptron(margins: jax.Array) -> jax.Array:
    # The gradient at 0 is that of a mistake, or zero weights would never change.
    return jnp.where(margins <= 0, -margins, jnp.zeros_like(margins))


def _squared_hinge(margins: jax.Array) -> jax.Array:
    return jnp.square(jnp.maximum(1 - margins, 0))


MARGIN_LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "perceptron": _perceptron,
    "squared_hinge": _squared_hinge,
}


def margin_loss(model: Model, normalize: Normalize, name: str) -> Loss:
    """Make the perceptron loss or the squared hinge of a classifier with one logit.

    It is the mean over a batch {"inputs": [batch, ...], "targets": [batch]} of the classes 0 and 1.

    Args:
      model: the model, with outputs [batch].
      normalize: `normalize(inputs)` makes the model's inputs of stored ones.
      name: "perceptron" or "squared_hinge", see `jaxlocal.models.margin_losses`.

    Returns:
      `loss(params, model_state, batch, key)`, which gives (loss, (model_state, {})).

    Raises:
      ConfigurationError: the name is unknown; when it is called, there is more than one logit.

    >>> from jaxlocal.models import build
    >>> model = build("logistic", (3,), outputs=1)
    >>> loss = margin_loss(model, lambda inputs: inputs, "squared_hinge")
    >>> params, model_state = model.init(jax.random.key(0))
    >>> batch = {"inputs": jnp.ones((2, 3)), "targets": jnp.array([0, 1])}
    >>> float(loss(params, model_state, batch, None)[0])  # all weights start at zero
    1.0

    Reference: Rosenblatt, "The perceptron", Psychological Review 1958
    """
    lookup("loss", name, MARGIN_LOSSES)

    def loss(
        params: Any, model_state: Any, batch: Any, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[Any, Any]]:
        raw, targets = of_batch(batch)
        outputs, model_state = model.apply(params, model_state, normalize(raw), key, True)
        return _metrics(outputs, targets, name)["loss"].mean(), (model_state, {})

    return loss


def margin_metrics(model: Model, normalize: Normalize, name: str) -> Metrics:
    """Make the metrics for `jaxlocal.evaluation.Evaluation` of `margin_loss`: loss and accuracy.

    Args:
      model, normalize, name: as for `margin_loss`.

    Returns:
      `metrics(params, model_state, batch)`, which gives {"loss": [batch], "accuracy": [batch]}.
    """
    lookup("loss", name, MARGIN_LOSSES)

    def metrics(params: Any, model_state: Any, batch: Any) -> dict[str, jax.Array]:
        raw, targets = of_batch(batch)
        outputs, _ = model.apply(params, model_state, normalize(raw), None, False)
        return _metrics(outputs, targets, name)

    return metrics


def _metrics(outputs: jax.Array, targets: jax.Array, name: str) -> dict[str, jax.Array]:
    if outputs.shape != targets.shape or outputs.ndim != 1:
        raise ConfigurationError(
            f"the {name} loss is of one logit for each example, [batch], got {list(outputs.shape)} "
            f"for targets {list(targets.shape)}"
        )
    usual = example_metrics(outputs, targets, classes=2)
    outputs = outputs.astype(wide(outputs.dtype))
    margins = jnp.where(targets == 1, outputs, -outputs)
    # Where the target is no class, the usual loss is NaN, and so is this one.
    loss = jnp.where(jnp.isnan(usual["loss"]), usual["loss"], MARGIN_LOSSES[name](margins))
    return {**usual, "loss": loss}
