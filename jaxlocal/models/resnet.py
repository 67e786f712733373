"""ResNet-18 for small images, with a normalisation that knows no batch."""

import jax
from flax import nnx

from jaxlocal.errors import ConfigurationError, lookup
from jaxlocal.models.adapters import Model, from_nnx
from jaxlocal.models.layers import Conv, Logits, image_sides

STAGES = (1, 2, 4, 8)  # channels of each stage, in widths
NORM_GROUPS = {"layer": 1, "group": 32}


def _conv(ins: int, outs: int, side: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return Conv(
        ins,
        outs,
        (side, side),
        (stride, stride),
        padding=side // 2,
        use_bias=False,
        kernel_init=nnx.initializers.he_normal(),
        rngs=rngs,
    )


class Block(nnx.Module):
    """Two 3x3 convolutions around which the input is added, projected where its shape changes."""

    def __init__(self, ins: int, outs: int, stride: int, groups: int, rngs: nnx.Rngs) -> None:
        self.conv1 = _conv(ins, outs, 3, stride, rngs)
        self.norm1 = nnx.GroupNorm(outs, groups, rngs=rngs)
        self.conv2 = _conv(outs, outs, 3, 1, rngs)
        self.norm2 = nnx.GroupNorm(outs, groups, rngs=rngs)
        self.projects = stride != 1 or ins != outs
        if self.projects:
            self.conv_around = _conv(ins, outs, 1, stride, rngs)
            self.norm_around = nnx.GroupNorm(outs, groups, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        inner = nnx.relu(self.norm1(self.conv1(images)))
        inner = self.norm2(self.conv2(inner))
        around = self.norm_around(self.conv_around(images)) if self.projects else images
        return nnx.relu(inner + around)


class ResNet18(nnx.Module):
    """A 3x3 stem without pooling, four stages of two blocks, a mean over pixels, a dense layer."""

    def __init__(
        self, channels: int, outputs: int, width: int, groups: int, rngs: nnx.Rngs
    ) -> None:
        self.stem = _conv(channels, width, 3, 1, rngs)
        self.norm = nnx.GroupNorm(width, groups, rngs=rngs)
        blocks, ins = [], width
        for stage, widths in enumerate(STAGES):
            outs = widths * width
            blocks.append(Block(ins, outs, 2 if stage else 1, groups, rngs))
            blocks.append(Block(outs, outs, 1, groups, rngs))
            ins = outs
        self.blocks = nnx.List(blocks)
        self.logits = Logits(ins, outputs, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        images = nnx.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            images = block(images)
        return self.logits(images.mean((1, 2)))


def resnet18(
    input_shape: tuple[int, ...], outputs: int, norm: str = "layer", width: int = 64
) -> Model:
    """ResNet-18 with the stem for CIFAR, 3x3 with stride 1 and no pooling.

    Stages of 1, 2, 4 and 8 widths of channels, two blocks each; convolutions have no bias and start
    from He's normal distribution. Batch normalisation is replaced by one that treats each example
    on its own, since workers that train apart would disagree on batch statistics: "layer" takes
    mean and variance over height, width and channels, "group" over height, width and each of 32
    groups of channels; both then scale and shift each channel.

    Args:
      input_shape: `(height, width, channels)` of one image.
      outputs: number of logits; with 1, outputs have shape `[batch]`.
      norm: "layer" or "group".
      width: channels of the first stage, 64 in the paper.

    Raises:
      ConfigurationError: an example is no image; the norm is unknown; its groups do not divide
        the width.

    References: K. He, X. Zhang, S. Ren, J. Sun, Deep Residual Learning for Image Recognition, CVPR
    2016, https://arxiv.org/abs/1512.03385. Y. Wu, K. He, Group Normalization, ECCV 2018,
    https://arxiv.org/abs/1803.08494. With "layer" norm for Local SGD: T. Qin, S. R. Etesami, C. A.
    Uribe, TMLR 2024, https://arxiv.org/abs/2201.12719.
    """
    _, _, channels = image_sides("resnet18", input_shape)
    groups = lookup("norm", norm, NORM_GROUPS)
    if width % groups:
        raise ConfigurationError(f"{groups} groups do not divide a width of {width} channels")
    return from_nnx(lambda rngs: ResNet18(channels, outputs, width, groups, rngs))
