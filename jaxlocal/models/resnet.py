"""Residual networks for small images: ResNet-18, and a ResNet-8 that trains on two CPU cores."""

from jaxlocal.models.adapters import Model
from jaxlocal.models.residual import Block, Shape, residual_network


def resnet18(
    input_shape: tuple[int, ...], outputs: int, norm: str = "layer", width: int = 64
) -> Model:
    """ResNet-18 for small images: the first convolution is 3x3 with stride 1, without pooling.

    Four stages of two blocks have width, 2 width, 4 width and 8 width channels. Convolutions have
    no bias and start from He's normal distribution. The normalisation is one of three:

    - "layer": mean and variance of each example over height, width and channels;
    - "group": mean and variance of each example over height, width and each of 32 groups of
      channels;
    - "batch": mean and variance of each channel over height, width and the worker's batch, as in
      the paper. Running statistics, 0.9 old + 0.1 new at every step, are the model state. Between
      averages, the statistics of the workers differ.

    Each of them then scales and shifts each channel.

    Args:
      input_shape: `(height, width, channels)` of one image.
      outputs: number of logits; with 1, outputs have shape `[batch]`.
      norm: "layer", "group" or "batch".
      width: channels of the first stage, 64 in the paper.

    Returns:
      The model; its model state is {} unless the norm is "batch".

    Raises:
      ConfigurationError: an example is not an image, the norm is unknown, or 32 groups do not
        divide the width.

    >>> import jax
    >>> params, _ = jax.eval_shape(resnet18((32, 32, 3), 10).init, jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    11173962

    References: K. He, X. Zhang, S. Ren, J. Sun, Deep Residual Learning for Image Recognition, CVPR
    2016, https://arxiv.org/abs/1512.03385. Y. Wu, K. He, Group Normalization, ECCV 2018,
    https://arxiv.org/abs/1803.08494. With "layer" norm for Local SGD: T. Qin, S. R. Etesami, C. A.
    Uribe, TMLR 2024, https://arxiv.org/abs/2201.12719.
    """
    shape = Shape(Block, width, [(times * width, 2) for times in (1, 2, 4, 8)])
    return residual_network("resnet18", input_shape, outputs, shape, norm)


def small_resnet(
    input_shape: tuple[int, ...], outputs: int, norm: str = "layer", width: int = 16
) -> Model:
    """ResNet-8 for CIFAR: three stages of one block with width, 2 width and 4 width channels.

    Args:
      input_shape, outputs, norm: see `resnet18`.
      width: channels of the first stage, 16 in the paper.

    Returns:
      The model; its model state is {} unless the norm is "batch".

    Raises:
      ConfigurationError: see `resnet18`.

    >>> import jax
    >>> params, model_state = jax.eval_shape(
    ...     small_resnet((32, 32, 3), 10, norm="batch").init, jax.random.key(0)
    ... )
    >>> sum(leaf.size for leaf in jax.tree.leaves(params)), model_state["norm"]["mean"].shape
    (78042, (16,))

    Reference: He et al. 2016, see `resnet18`, section 4.2 with n = 1.

    Differs from the paper in: where the shape changes, the shortcut is a 1x1 convolution and not a
    padding by zeros.
    """
    shape = Shape(Block, width, [(times * width, 1) for times in (1, 2, 4)])
    return residual_network("small_resnet", input_shape, outputs, shape, norm)
