"""Convolutional networks for small images: that of Multi-Level Local SGD, and CifarNet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlocal.models.adapters import Model
from jaxlocal.models.layers import Conv, Linear, Logits, image_sides
from jaxlocal.models.nnx_modules import from_nnx
from jaxlocal.nn import conv_relu_max_pool, max_pool

RADIUS = 4  # of CifarNet's local response normalisation, in channels


class MllCnn(nnx.Module):
    """Two 5x5 convolutions with 10 and 20 channels, each pooled by 2, and a hidden layer of 100."""

    def __init__(
        self, height: int, width: int, channels: int, outputs: int, rngs: nnx.Rngs
    ) -> None:
        self.first = Conv(channels, 10, (5, 5), rngs=rngs)
        self.second = Conv(10, 20, (5, 5), rngs=rngs)
        self.hidden = Linear(20 * (height // 4) * (width // 4), 100, rngs=rngs)
        self.logits = Logits(100, outputs, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        half = _pooled(images, self.first)
        quarter = _pooled(half, self.second)
        # The pooled images have the batch last in memory. This is quarter.reshape(batch, -1) as the
        # transposition of a matrix, which becomes part of the product; else it takes a slow pass.
        flat = quarter.transpose(1, 2, 3, 0).reshape(-1, images.shape[0]).T
        return self.logits(nnx.relu(self.hidden(flat)))


class Cifarnet(nnx.Module):
    """Two 5x5 convolutions with 64 channels, each pooled by 2, and hidden layers of 384 and 192."""

    def __init__(
        self, height: int, width: int, channels: int, outputs: int, rngs: nnx.Rngs
    ) -> None:
        normal = nnx.initializers.truncated_normal
        conv = functools.partial(Conv, kernel_size=(5, 5), kernel_init=normal(0.05), rngs=rngs)
        bias = nnx.initializers.constant(0.1)
        dense = functools.partial(Linear, kernel_init=normal(0.04), bias_init=bias, rngs=rngs)
        self.first = conv(channels, 64)
        self.second = conv(64, 64)
        self.hidden = dense(64 * (height // 4) * (width // 4), 384)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last_hidden = dense(384, 192)
        self.logits = Logits(192, outputs, kernel_init=normal(1 / 192), rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        half = _normalized(_pooled(images, self.first))
        quarter = max_pool(_normalized(nnx.relu(self.second(half))), (2, 2), (2, 2))
        hidden = nnx.relu(self.hidden(quarter.reshape(images.shape[0], -1)))
        return self.logits(nnx.relu(self.last_hidden(self.dropout(hidden))))


def _normalized(images: jax.Array) -> jax.Array:
    """Local response normalisation: x / (1 + α · sum of the squares of nearby channels)^β."""
    channel = np.arange(images.shape[-1])
    near = np.abs(np.subtract.outer(channel, channel)) <= RADIUS
    # As a matrix product, which is faster than a window sum over so few channels.
    squares = jnp.square(images) @ jnp.asarray(near, images.dtype)
    return images * (1 + 0.001 / 9 * squares) ** -0.75


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


def cifarnet(input_shape: tuple[int, ...], outputs: int) -> Model:
    """CifarNet: convolutional network for CIFAR with two convolutions and local response norms.

    conv 5x5 to 64 channels, relu, maxpool 2, norm; conv 5x5 to 64 channels, relu, norm, maxpool 2;
    dense 384, relu, dropout 0.5; dense 192, relu; dense. The norm divides by (1 + 0.001 / 9 · the
    sum of squares of the 9 channels around each)^0.75. Convolutions keep the size of the image;
    pooling drops an odd last row or column.

    Initial weights are normal, and truncated at two standard deviations: 0.05 in convolutions, 0.04
    in hidden layers, 1 / 192 in the last layer. Initial biases are 0.1 in hidden layers, and zero
    elsewhere.

    Args:
      input_shape: `(height, width, channels)` of one image, height and width of 4 or more.
      outputs: number of logits; with 1, outputs have shape `[batch]`.

    Returns:
      The model, without model state.

    Raises:
      ConfigurationError: an example is not an image, or the image is too small.

    >>> params, _ = jax.eval_shape(cifarnet((32, 32, 3), 10).init, jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    1756426

    Reference: several networks have this name; this is that of TensorFlow's model library, TF-Slim
    (`cifarnet`), a variant of A. Krizhevsky's for cuda-convnet.
    """
    height, width, channels = image_sides("cifarnet", input_shape, least=4)
    return from_nnx(lambda rngs: Cifarnet(height, width, channels, outputs, rngs))
