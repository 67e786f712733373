"""The small convolutional network of Multi-Level Local SGD."""

import jax
from flax import nnx

from jaxlocal.models.adapters import Model
from jaxlocal.models.layers import Conv, Logits, image_sides
from jaxlocal.models.nnx_modules import from_nnx
from jaxlocal.nn import conv_relu_max_pool


class MllCnn(nnx.Module):
    """Two 5x5 convolutions with 10 and 20 channels, each pooled by 2, and a hidden layer of 100."""

    def __init__(
        self, height: int, width: int, channels: int, outputs: int, rngs: nnx.Rngs
    ) -> None:
        self.first = Conv(channels, 10, (5, 5), rngs=rngs)
        self.second = Conv(10, 20, (5, 5), rngs=rngs)
        self.hidden = nnx.Linear(20 * (height // 4) * (width // 4), 100, rngs=rngs)
        self.logits = Logits(100, outputs, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        half = _pooled(images, self.first)
        quarter = _pooled(half, self.second)
        hidden = nnx.relu(self.hidden(quarter.reshape(images.shape[0], -1)))
        return self.logits(hidden)


def _pooled(images: jax.Array, layer: nnx.Conv) -> jax.Array:
    assert layer.bias is not None
    kernel, bias = layer.kernel[...], layer.bias[...]
    return conv_relu_max_pool(images.astype(kernel.dtype), kernel, bias)


def mll_cnn(input_shape: tuple[int, ...], outputs: int) -> Model:
    """Convolutional network for small images, with two convolutions, of Multi-Level Local SGD.

    conv 5x5 to 10 channels, relu, maxpool 2; conv 5x5 to 20 channels, relu, maxpool 2; dense 100,
    relu; dense. Convolutions keep the size of the image; pooling drops an odd last row or column.

    Args:
      input_shape: `(height, width, channels)` of one image, height and width of 4 or more.
      outputs: number of logits; with 1, outputs have shape `[batch]`.

    Returns:
      The model, without model state.

    Raises:
      ConfigurationError: an example is not an image, or the image is too small.

    >>> params, _ = jax.eval_shape(mll_cnn((28, 28, 1), 62).init, jax.random.key(0))
    >>> params["hidden"]["kernel"].shape
    (980, 100)

    Reference: T. Castiglia, A. Das, S. Patterson, Multi-Level Local SGD: Distributed SGD for
    Heterogeneous Hierarchical Networks, ICLR 2021, https://arxiv.org/abs/2007.13819.

    Differs from the paper in: initial weights are Flax's, normal with variance 1 / fan-in, and
    biases are zero, since the paper states none.
    """
    height, width, channels = image_sides("mll_cnn", input_shape, least=4)
    return from_nnx(lambda rngs: MllCnn(height, width, channels, outputs, rngs))
