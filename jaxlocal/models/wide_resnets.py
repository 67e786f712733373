"""Wide residual networks for small images."""

from jaxlocal.errors import ConfigurationError, check_integer
from jaxlocal.models.adapters import Model
from jaxlocal.models.residual import PreactivatedBlock, Shape, residual_network

STEM = 16  # channels after the first convolution


def wide_resnet(
    input_shape: tuple[int, ...],
    outputs: int,
    depth: int = 40,
    widening: int = 8,
    norm: str = "batch",
) -> Model:
    """Wide ResNet, WRN-depth-widening: a pre-activated ResNet for CIFAR with k times the channels.

    A 3x3 convolution to 16 channels, then three stages of n = (depth - 4) / 6 blocks with 16 k,
    32 k and 64 k channels; the first block of the second and third stage has stride 2. A block
    is x ← x + conv(relu(norm(conv(relu(norm(x)))))) with 3x3 convolutions; where the shape changes,
    the x that is added is a 1x1 convolution of the first relu(norm(x)). Then norm, relu, a mean
    over pixels and a dense layer. Convolutions have no bias and start from He's normal
    distribution. It takes images of any size.

    Args:
      input_shape: `(height, width, channels)` of one image.
      outputs: number of logits; with 1, outputs have shape `[batch]`.
      depth: number of layers with weights along the longest way, 6 n + 4.
      widening: k, the factor on the channels; 1 is a ResNet.
      norm: "layer", "group" or "batch", see `resnet18`; "batch" in the paper.

    Returns:
      The model; its model state is {} unless the norm is "batch".

    Raises:
      ConfigurationError: the depth is not 6 n + 4, or as in `resnet18`; 32 groups divide no network
        with 16 channels after the first convolution.

    >>> import jax
    >>> params, _ = jax.eval_shape(wide_resnet((32, 32, 3), 10, 10, 2).init, jax.random.key(0))
    >>> params["blocks"]["2"]["conv1"]["kernel"].shape
    (3, 3, 64, 128)

    Reference: S. Zagoruyko, N. Komodakis, Wide Residual Networks, BMVC 2016,
    https://arxiv.org/abs/1605.07146. WRN-40-8 on CIFAR-100 is the model of CSER: C. Xie et al.,
    NeurIPS 2020, https://arxiv.org/abs/2007.13221.

    Differs from the paper in: there is no dropout, which the paper adds in some experiments, and
    He's variance is that of the inputs of a convolution, 2 / fan-in, where the released code has
    2 / fan-out.
    """
    check_integer("the widening of wide_resnet", widening)
    if depth < 10 or depth % 6 != 4:
        raise ConfigurationError(
            f"wide_resnet needs a depth of 6 n + 4, such as 16, 28 or 40, got {depth}"
        )
    stages = [(times * STEM * widening, (depth - 4) // 6) for times in (1, 2, 4)]
    shape = Shape(PreactivatedBlock, STEM, stages, preactivated=True)
    return residual_network("wide_resnet", input_shape, outputs, shape, norm)
