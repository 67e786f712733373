"""The models of the papers by name, adapters for a user's own model, and the loss to train it.

A model is a pair of pure functions, `Model(init, apply)`. To train your own, give `from_nnx` a
function that builds a Flax NNX module, `from_linen` a Linen module, or `from_functions` two plain
functions. `training_loss` makes the loss of a model, and `evaluation_metrics` its metrics of each
example. `in_precision` makes any model compute in bfloat16.
"""

from collections.abc import Callable
from functools import partial

from jaxlocal.errors import ConfigurationError, lookup
from jaxlocal.models.adapters import Model, from_functions, from_linen
from jaxlocal.models.cnn import cifarnet, mll_cnn
from jaxlocal.models.imagenet_resnets import imagenet_resnet
from jaxlocal.models.nnx_modules import from_nnx
from jaxlocal.models.precision import in_precision
from jaxlocal.models.resnet import resnet18, small_resnet
from jaxlocal.models.simple import linear, logistic, mlp
from jaxlocal.models.supervised import evaluation_metrics, example_metrics, training_loss
from jaxlocal.models.transformers import transformer
from jaxlocal.models.vision_transformers import vision_transformer
from jaxlocal.models.wide_resnets import wide_resnet

__all__ = [
    "MODELS",
    "Model",
    "build",
    "cifarnet",
    "evaluation_metrics",
    "example_metrics",
    "from_functions",
    "from_linen",
    "from_nnx",
    "imagenet_resnet",
    "in_precision",
    "linear",
    "logistic",
    "mll_cnn",
    "mlp",
    "outputs_for",
    "resnet18",
    "small_resnet",
    "training_loss",
    "transformer",
    "vision_transformer",
    "wide_resnet",
]

MODELS: dict[str, Callable[[tuple[int, ...], int], Model]] = {
    "logistic": logistic,
    "linear": linear,
    "mlp": mlp,
    "mll_cnn": mll_cnn,
    "cifarnet": cifarnet,
    "resnet18_layer_norm": partial(resnet18, norm="layer"),
    "resnet18_group_norm": partial(resnet18, norm="group"),
    "resnet18_batch_norm": partial(resnet18, norm="batch"),
    "small_resnet_layer_norm": partial(small_resnet, norm="layer"),
    "small_resnet_batch_norm": partial(small_resnet, norm="batch"),
    "tiny_resnet_layer_norm": partial(small_resnet, norm="layer", width=8),
    "tiny_resnet_batch_norm": partial(small_resnet, norm="batch", width=8),
    "resnet18_imagenet": partial(imagenet_resnet, depth=18),
    "resnet50": partial(imagenet_resnet, depth=50),
    "resnet101": partial(imagenet_resnet, depth=101),
    "resnet152": partial(imagenet_resnet, depth=152),
    "resnet50_v2": partial(imagenet_resnet, depth=50, preactivated=True),
    "wide_resnet_16_4": partial(wide_resnet, depth=16, widening=4),
    "wide_resnet_40_8": partial(wide_resnet, depth=40, widening=8),
    "small_vit": partial(vision_transformer, patch=4, layers=4, width=64, heads=4),
    "tiny_vit": partial(vision_transformer, patch=8, layers=4, width=64, heads=4),
    "vit_s16": partial(vision_transformer, width=384, heads=6),
    "vit_b16": vision_transformer,
    "transformer": transformer,
    "small_transformer": partial(transformer, layers=2, width=64, heads=2),
}


def build(name: str, input_shape: tuple[int, ...], outputs: int) -> Model:
    """Build a model by its name.

    Args:
      name: a key of `MODELS`.
      input_shape: the shape of one example: `(features,)`, `(height, width, channels)` or, for the
        transformer, `(length,)` in tokens.
      outputs: number of logits. Outputs have shape `[batch, outputs]`, or `[batch]` for 1 output;
        those of the transformer have shape `[batch, length, outputs]`.

    Returns:
      The model.

    Raises:
      ConfigurationError: the name is unknown, `outputs` is less than 1, or the model cannot take
        examples of this shape.

    >>> import jax
    >>> model = build("mll_cnn", (28, 28, 1), outputs=62)
    >>> params, model_state = jax.eval_shape(model.init, jax.random.key(0))
    >>> params["logits"]["kernel"].shape, model_state
    ((100, 62), {})
    """
    make = lookup("model", name, MODELS)
    if outputs < 1:
        raise ConfigurationError(f"{name} needs 1 output or more, got {outputs}")
    return make(tuple(input_shape), outputs)


def outputs_for(classes: int) -> int:
    """Number of logits for a number of classes: 1 for two classes, otherwise one for each class.

    Args:
      classes: number of classes, 2 or more.

    >>> outputs_for(2), outputs_for(10)
    (1, 10)
    """
    return 1 if classes == 2 else classes
