"""Layers that the models share, and the check of an image's shape."""

from functools import partial
from typing import Any

import jax
from flax import nnx

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.variables import Statistic
from jaxlocal.nn import conv_general_dilated, dot_general

Conv = partial(nnx.Conv, conv_general_dilated=conv_general_dilated)
Linear = partial(nnx.Linear, dot_general=dot_general)


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation whose outputs have the dtype of its inputs.

    The statistics are float32; without the cast, all later layers would compute in float32.
    """

    def __init__(self, num_features: int, *, rngs: nnx.Rngs, **settings: Any) -> None:
        super().__init__(num_features, rngs=rngs, **settings)
        self.mean, self.var = Statistic(self.mean[...]), Statistic(self.var[...])

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        return super().__call__(x, use_running_average, mask=mask).astype(x.dtype)


class Logits(nnx.Linear):
    """Last layer: `[batch, features]` to `[batch, outputs]`, or to `[batch]` for one output."""

    def __init__(self, features: int, outputs: int, **settings: Any) -> None:
        super().__init__(features, outputs, dot_general=dot_general, **settings)

    def __call__(self, inputs: jax.Array, out_sharding: object = None) -> jax.Array:
        logits = super().__call__(inputs, out_sharding)
        return logits[..., 0] if self.out_features == 1 else logits


def image_sides(model: str, input_shape: tuple[int, ...], least: int = 1) -> tuple[int, int, int]:
    """Height, width and channels of the images that a model takes.

    Args:
      model: the model's name, for the error.
      input_shape: the shape of one example.
      least: the smallest height and width that the model takes, in pixels.

    Returns:
      (height, width, channels).

    Raises:
      ConfigurationError: an example is not an image, or the image is too small.

    >>> image_sides("mll_cnn", (28, 28, 1))
    (28, 28, 1)
    """
    if len(input_shape) != 3:
        wanted = "images [height, width, channels]"
        raise ConfigurationError(f"{model} needs {wanted}; the examples have shape {input_shape}")
    height, width, channels = input_shape
    if min(height, width) < least:
        sides = f"these have {height} x {width}"
        raise ConfigurationError(f"{model} needs images of {least} x {least} or more; {sides}")
    return height, width, channels
