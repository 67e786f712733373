"""From flags to a model, its gradients and its metrics on a dataset."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlocal
from experiments.building.config import Config
from jaxlocal import ConfigurationError
from jaxlocal.data import Augmentation, Dataset
from jaxlocal.errors import lookup
from jaxlocal.models import Model, build, in_precision, outputs_for
from jaxlocal.models.margin_losses import margin_loss, margin_metrics
from jaxlocal.models.supervised import Loss, evaluation_metrics, training_loss
from jaxlocal.stages.gradient import GradFn
from jaxlocal.types import Tree

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_model(config: Config, dataset: Dataset) -> Model:
    """The model for a dataset, with the initial parameters that the dataset defines, if any.

    Raises:
      ConfigurationError: an unknown model, or one that does not fit the dataset.
    """
    outputs = outputs_for(dataset.classes) if dataset.classes else 1
    if config.model == "linear" and dataset.classes:
        raise ConfigurationError(
            f"linear is a regression, and {config.dataset} has {dataset.classes} classes"
        )
    model = build(config.model, dataset.input_shape, outputs)
    precision = lookup("precision", config.precision, PRECISIONS)
    if precision != jnp.float32:
        model = in_precision(model, precision)
    if dataset.start is None:
        return model
    if config.model != "linear":
        raise ConfigurationError(
            f"{config.dataset} defines the initial parameters of a linear model, got "
            f"--model={config.model}"
        )
    return _starting_at(jnp.asarray(dataset.start), model)


def _starting_at(start: jax.Array, model: Model) -> Model:
    def init(key):
        params, model_state = model.init(key)
        return jax.tree.map(lambda x: start.reshape(x.shape).astype(x.dtype), params), model_state

    return model._replace(init=init)


def make_gradients(
    config: Config, dataset: Dataset, model: Model, augmentation: Augmentation | None
) -> GradFn:
    """The gradient of the loss on a worker's batch.

    Examples of the resident pool are augmented here; those of a stream are augmented where they are
    read.

    Raises:
      ConfigurationError: label smoothing or mixup of a regression, or mixup of tokens.
    """
    loss = _training_loss(config, dataset, model)
    if augmentation is not None and not config.stream:
        loss = _augmented(loss, augmentation)
    grad_fn = jaxlocal.gradients(loss, stateful=True)
    return jaxlocal.accumulate(grad_fn, config.accumulation)


def _training_loss(config: Config, dataset: Dataset, model: Model) -> Loss:
    if dataset.loss and (config.mixup or config.label_smoothing):
        raise ConfigurationError(
            f"--mixup={config.mixup} and --label_smoothing={config.label_smoothing} are for a "
            f"cross-entropy, and the loss of {config.dataset} is {dataset.loss}"
        )
    if dataset.loss:
        return margin_loss(model, dataset.normalize, dataset.loss)
    if config.mixup and len(dataset.input_shape) == 1 and _reads_tokens(dataset):
        raise ConfigurationError(
            f"--mixup={config.mixup} mixes inputs that are numbers, and those of {config.dataset} "
            f"are tokens"
        )
    return training_loss(
        model,
        dataset.normalize,
        dataset.classes,
        label_smoothing=config.label_smoothing,
        mixup=config.mixup,
    )


def _reads_tokens(dataset: Dataset) -> bool:
    return np.asarray(dataset.train_source()[0]["inputs"]).dtype == np.int32


def _augmented(loss: Loss, augmentation: Augmentation) -> Loss:
    def augmented(params, model_state, batch, key):
        inputs = augmentation.apply(batch["inputs"], batch)
        return loss(params, model_state, {**batch, "inputs": inputs}, key)

    return augmented


def make_metrics(
    config: Config, dataset: Dataset, model: Model, shapes: tuple[Tree, Tree], example: Tree
) -> Any:
    """The metrics of the model on examples, `metrics(params, model_state, batch)`.

    Args:
      shapes: of the model's parameters and state.
      example: of the dataset.

    Raises:
      ConfigurationError: the outputs of the model do not fit the targets of the dataset.
    """
    if dataset.loss:
        metrics = margin_metrics(model, dataset.normalize, dataset.loss)
    else:
        metrics = evaluation_metrics(model, dataset.normalize, dataset.classes)
    batch = jax.tree.map(lambda x: np.asarray(x)[None], example)
    try:
        jax.eval_shape(metrics, *shapes, batch)
    except ConfigurationError as error:
        raise ConfigurationError(f"{config.model} does not fit {config.dataset}: {error}") from None
    return jax.jit(metrics, inline=True)  # one trace for batches of training and test examples
