"""Residual networks for large images: ResNet-18, 50, 101 and 152, and those with pre-activation."""

from flax import nnx

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.adapters import Model
from jaxlocal.models.residual import (
    EXPANSION,
    Block,
    Bottleneck,
    PreactivatedBlock,
    PreactivatedBottleneck,
    Shape,
    residual_network,
)

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # by depth
BLOCK_OF: dict[tuple[bool, bool], type[nnx.Module]] = {  # by pre-activation and bottlenecks
    (False, False): Block,
    (False, True): Bottleneck,
    (True, False): PreactivatedBlock,
    (True, True): PreactivatedBottleneck,
}


def imagenet_resnet(
    input_shape: tuple[int, ...],
    outputs: int,
    depth: int = 50,
    preactivated: bool = False,
    norm: str = "batch",
    width: int = 64,
) -> Model:
    """ResNet for ImageNet: a 7x7 convolution with stride 2, max-pooling, four stages of blocks.

    x = relu(norm(conv 7x7, stride 2)), max-pooling of 3x3 with stride 2. The blocks of the four
    stages have inner convolutions of width, 2 width, 4 width and 8 width channels; the first block
    of each stage but the first has stride 2. Then a mean over pixels and a dense layer. A block is

    - up to depth 18, two 3x3 convolutions;
    - from depth 50 on, a bottleneck: convolutions of 1x1, 3x3 and 1x1, the last one with four times
      the channels. The 3x3 convolution has the stride, which is called version 1.5;

    each followed by a norm, and by relu but for the last one; x ← relu(inner + x). With
    pre-activation (version 2), norm and relu come before each convolution, x ← inner + x, and norm
    and relu follow the last block. Where the shape changes, x passes a 1x1 convolution, with a norm
    in version 1.

    It takes images of any size; those of 224 x 224 reach the mean over pixels as 7 x 7.

    Args:
      input_shape: `(height, width, channels)` of one image.
      outputs: number of logits; with 1, outputs have shape `[batch]`.
      depth: 18, 50, 101 or 152.
      preactivated: version 2 of the network.
      norm: "layer", "group" or "batch", see `resnet18`.
      width: channels after the first convolution, 64 in the paper.

    Returns:
      The model; its model state is {} unless the norm is "batch".

    Raises:
      ConfigurationError: another depth, or as in `resnet18`.

    >>> import jax
    >>> params, _ = jax.eval_shape(imagenet_resnet((224, 224, 3), 1000).init, jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    25557032

    References: K. He, X. Zhang, S. Ren, J. Sun, Deep Residual Learning for Image Recognition, CVPR
    2016, https://arxiv.org/abs/1512.03385. Version 2: K. He et al., Identity Mappings in Deep
    Residual Networks, ECCV 2016, https://arxiv.org/abs/1603.05027, with the norms before and after
    the max-pooling of MXNet's model, which the experiments of CSER train.

    Differs from the papers in: the stride of a bottleneck is in its 3x3 and not in its first 1x1
    convolution. Differs from MXNet's version 2 in: the input has no norm. The scale of the last
    norm of a block starts at one, as there; later recipes start it at zero.
    """
    if depth not in BLOCKS:
        *depths, last = BLOCKS
        wanted = f"{', '.join(map(str, depths))} or {last}"
        raise ConfigurationError(f"imagenet_resnet has a depth of {wanted}, got {depth}")
    bottlenecks = depth >= 50
    block = BLOCK_OF[preactivated, bottlenecks]
    outs = ((EXPANSION if bottlenecks else 1) * width * 2**stage for stage in range(4))
    stages = list(zip(outs, BLOCKS[depth], strict=True))
    shape = Shape(block, width, stages, preactivated, large_images=True)
    return residual_network("imagenet_resnet", input_shape, outputs, shape, norm)
