"""Models for inputs of any shape: linear and logistic regression, and a multilayer perceptron."""

import math

import jax
from flax import nnx

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.adapters import Model
from jaxlocal.models.layers import Linear, Logits
from jaxlocal.models.nnx_modules import from_nnx

HIDDEN = 128


class Flat(nnx.Module):
    """One linear map of the flattened input, with initial weights of zero."""

    def __init__(self, features: int, outputs: int, use_bias: bool, rngs: nnx.Rngs) -> None:
        zero = nnx.initializers.zeros_init()
        self.map = Logits(features, outputs, use_bias=use_bias, kernel_init=zero, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.map(inputs.reshape(inputs.shape[0], -1))


class Perceptron(nnx.Module):
    """Two hidden layers with relu on the flattened input, and a dense layer."""

    def __init__(self, features: int, outputs: int, rngs: nnx.Rngs) -> None:
        self.first = Linear(features, HIDDEN, rngs=rngs)
        self.second = Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.logits = Logits(HIDDEN, outputs, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        hidden = nnx.relu(self.first(inputs.reshape(inputs.shape[0], -1)))
        return self.logits(nnx.relu(self.second(hidden)))


def logistic(input_shape: tuple[int, ...], outputs: int) -> Model:
    """Logistic regression with a bias; softmax regression for several outputs.

    Initial weights are zero.

    Args:
      input_shape: the shape of one example, of any rank.
      outputs: number of logits; with 1, outputs have shape `[batch]`.

    Returns:
      The model, without model state.

    >>> params, _ = logistic((28, 28, 1), 1).init(jax.random.key(0))
    >>> params["map"]["kernel"].shape
    (784, 1)
    """
    return from_nnx(lambda rngs: Flat(math.prod(input_shape), outputs, True, rngs))


def linear(input_shape: tuple[int, ...], outputs: int = 1) -> Model:
    """Linear regression without a bias; outputs have shape `[batch]`.

    Initial weights are zero.

    Args:
      input_shape: the shape of one example, of any rank.
      outputs: 1.

    Returns:
      The model, without model state.

    Raises:
      ConfigurationError: `outputs` is not 1.

    >>> params, _ = linear((32,)).init(jax.random.key(0))
    >>> jax.tree.map(jax.numpy.shape, params)
    {'map': {'kernel': (32, 1)}}
    """
    if outputs != 1:
        raise ConfigurationError(f"linear regression has 1 output, got {outputs}")
    return from_nnx(lambda rngs: Flat(math.prod(input_shape), 1, False, rngs))


def mlp(input_shape: tuple[int, ...], outputs: int) -> Model:
    """Multilayer perceptron with two hidden layers of 128 units and relu.

    Args:
      input_shape: the shape of one example, of any rank.
      outputs: number of logits; with 1, outputs have shape `[batch]`.

    Returns:
      The model, without model state.

    >>> params, _ = jax.eval_shape(mlp((28, 28, 1), 10).init, jax.random.key(0))
    >>> params["first"]["kernel"].shape, params["logits"]["kernel"].shape
    ((784, 128), (128, 10))
    """
    return from_nnx(lambda rngs: Perceptron(math.prod(input_shape), outputs, rngs))
