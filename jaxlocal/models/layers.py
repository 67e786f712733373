"""What the models share: their convolution, batch norm and last layer, and the check of their
input."""

from functools import partial

import jax
from flax import nnx

from jaxlocal.errors import ConfigurationError
from jaxlocal.nn import conv_general_dilated

Conv = partial(nnx.Conv, conv_general_dilated=conv_general_dilated)


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation whose outputs have the type of its inputs: its statistics are float32,
    and would make float32 of all that follows."""

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        return super().__call__(x, use_running_average, mask=mask).astype(x.dtype)


class Logits(nnx.Linear):
    """A last layer: `[batch, features]` to `[batch, outputs]`, or to `[batch]` for one output."""

    def __call__(self, inputs: jax.Array, out_sharding: object = None) -> jax.Array:
        logits = super().__call__(inputs, out_sharding)
        return logits[..., 0] if self.out_features == 1 else logits


def image_sides(model: str, input_shape: tuple[int, ...], least: int = 1) -> tuple[int, int, int]:
    """The height, width and channels of the images that a model is built for.

    Args:
      model: its name, for the error.
      input_shape: the shape of one example.
      least: the smallest height and width that the model can work on.

    Raises:
      ConfigurationError: an example is no image, or too small a one.

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
