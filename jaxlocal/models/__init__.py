"""The models of the papers, by name, and the adapters for a user's own.

A model is a pair of pure functions, `Model(init, apply)`. To train one of your own, give `from_nnx`
a function that builds a Flax NNX module, `from_linen` a Linen module, or `from_functions` two plain
functions. `in_precision` makes any of them compute in bfloat16.
"""

from collections.abc import Callable
from functools import partial

from jaxlocal.errors import ConfigurationError, lookup
from jaxlocal.models import mll_cnn, resnet, simple, transformer
from jaxlocal.models.adapters import Model, from_functions, from_linen, from_nnx
from jaxlocal.models.precision import in_precision

__all__ = [
    "MODELS",
    "Model",
    "build",
    "from_functions",
    "from_linen",
    "from_nnx",
    "in_precision",
    "outputs_for",
]

MODELS: dict[str, Callable[[tuple[int, ...], int], Model]] = {
    "logistic": simple.logistic,
    "linear": simple.linear,
    "mlp": simple.mlp,
    "mll_cnn": mll_cnn.mll_cnn,
    "resnet18_layer_norm": partial(resnet.resnet18, norm="layer"),
    "resnet18_group_norm": partial(resnet.resnet18, norm="group"),
    "resnet18_batch_norm": partial(resnet.resnet18, norm="batch"),
    "small_resnet_layer_norm": partial(resnet.small_resnet, norm="layer"),
    "small_resnet_batch_norm": partial(resnet.small_resnet, norm="batch"),
    "transformer": transformer.transformer,
    "small_transformer": partial(transformer.transformer, layers=2, width=64, heads=2),
}


def build(name: str, input_shape: tuple[int, ...], outputs: int) -> Model:
    """The model of that name.

    Args:
      name: a key of `MODELS`.
      input_shape: the shape of one example, `(features,)`, `(height, width, channels)` or, for the
        transformer, `(length,)` of tokens.
      outputs: number of logits, so outputs have shape `[batch, outputs]`; with 1, `[batch]`. The
        transformer's have `[batch, length, outputs]`.

    Raises:
      ConfigurationError: an unknown name, no outputs, or examples of a shape the model cannot take.

    >>> import jax
    >>> model = build("mll_cnn", (28, 28, 1), outputs=62)
    >>> params, model_state = jax.eval_shape(model.init, jax.random.key(0))
    >>> params["logits"]["kernel"].shape, model_state
    ((100, 62), {})
    """
    make = lookup("model", name, MODELS)
    if outputs < 1:
        raise ConfigurationError(f"{name} needs 1 output or more, and {outputs} were asked for")
    return make(tuple(input_shape), outputs)


def outputs_for(classes: int) -> int:
    """How many logits tell so many classes apart: one for two classes, otherwise one a class.

    >>> outputs_for(2), outputs_for(10)
    (1, 10)
    """
    return 1 if classes == 2 else classes
