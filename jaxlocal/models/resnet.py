"""Residual networks for small images: ResNet-18, and a ResNet-8 that trains on two CPU cores."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
from flax import nnx

from jaxlocal.errors import ConfigurationError, lookup
from jaxlocal.models.adapters import Model
from jaxlocal.models.layers import BatchNorm, Conv, Logits, image_sides
from jaxlocal.models.nnx_modules import from_nnx

GROUPS = 32
NORMS: dict[str, Callable[..., nnx.Module]] = {
    "layer": partial(nnx.GroupNorm, num_groups=1),
    "group": partial(nnx.GroupNorm, num_groups=GROUPS),
    "batch": partial(BatchNorm, momentum=0.9, epsilon=1e-5),
}


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
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, ins: int, outs: int, stride: int, norm: str, rngs: nnx.Rngs) -> None:
        self.conv1 = _conv(ins, outs, 3, stride, rngs)
        self.norm1 = NORMS[norm](outs, rngs=rngs)
        self.conv2 = _conv(outs, outs, 3, 1, rngs)
        self.norm2 = NORMS[norm](outs, rngs=rngs)
        self.projects = stride != 1 or ins != outs
        if self.projects:
            self.conv_around = _conv(ins, outs, 1, stride, rngs)
            self.norm_around = NORMS[norm](outs, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        inner = nnx.relu(self.norm1(self.conv1(images)))
        inner = self.norm2(self.conv2(inner))
        around = self.norm_around(self.conv_around(images)) if self.projects else images
        return nnx.relu(inner + around)


class ResNet(nnx.Module):
    """A 3x3 convolution without pooling, stages of blocks, a mean over pixels, a dense layer."""

    def __init__(
        self,
        channels: int,
        outputs: int,
        widths: Sequence[int],
        blocks: int,
        norm: str,
        rngs: nnx.Rngs,
    ) -> None:
        ins = widths[0]
        self.stem = _conv(channels, ins, 3, 1, rngs)
        self.norm = NORMS[norm](ins, rngs=rngs)
        blocks_of_all_stages = []
        for stage, outs in enumerate(widths):
            for number in range(blocks):
                stride = 2 if stage and not number else 1
                blocks_of_all_stages.append(Block(ins, outs, stride, norm, rngs))
                ins = outs
        self.blocks = nnx.List(blocks_of_all_stages)
        self.logits = Logits(ins, outputs, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        images = nnx.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            images = block(images)
        return self.logits(images.mean((1, 2)))


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

    >>> params, _ = jax.eval_shape(resnet18((32, 32, 3), 10).init, jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    11173962

    References: K. He, X. Zhang, S. Ren, J. Sun, Deep Residual Learning for Image Recognition, CVPR
    2016, https://arxiv.org/abs/1512.03385. Y. Wu, K. He, Group Normalization, ECCV 2018,
    https://arxiv.org/abs/1803.08494. With "layer" norm for Local SGD: T. Qin, S. R. Etesami, C. A.
    Uribe, TMLR 2024, https://arxiv.org/abs/2201.12719.
    """
    widths = (width, 2 * width, 4 * width, 8 * width)
    return _resnet("resnet18", input_shape, outputs, widths, 2, norm)


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

    >>> params, model_state = jax.eval_shape(
    ...     small_resnet((32, 32, 3), 10, norm="batch").init, jax.random.key(0)
    ... )
    >>> sum(leaf.size for leaf in jax.tree.leaves(params)), model_state["norm"]["mean"].shape
    (78042, (16,))

    Reference: He et al. 2016, see `resnet18`, section 4.2 with n = 1.

    Differs from the paper in: where the shape changes, the shortcut is a 1x1 convolution and not a
    padding by zeros.
    """
    return _resnet("small_resnet", input_shape, outputs, (width, 2 * width, 4 * width), 1, norm)


def _resnet(
    model: str,
    input_shape: tuple[int, ...],
    outputs: int,
    widths: Sequence[int],
    blocks: int,
    norm: str,
) -> Model:
    _, _, channels = image_sides(model, input_shape)
    lookup("norm", norm, NORMS)
    if norm == "group" and widths[0] % GROUPS:
        raise ConfigurationError(f"{GROUPS} groups do not divide a width of {widths[0]} channels")
    return from_nnx(lambda rngs: ResNet(channels, outputs, widths, blocks, norm, rngs))
