"""What all residual networks are made of: convolutions, norms, blocks, and the network of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
from flax import nnx

from jaxlocal.errors import ConfigurationError, lookup
from jaxlocal.models.adapters import Model
from jaxlocal.models.layers import BatchNorm, Conv, Logits, image_sides
from jaxlocal.models.nnx_modules import from_nnx
from jaxlocal.nn import max_pool

EXPANSION = 4  # output channels of a bottleneck, in channels of its 3x3 convolution
GROUPS = 32
NORMS: dict[str, Callable[..., nnx.Module]] = {
    "layer": partial(nnx.GroupNorm, num_groups=1),
    "group": partial(nnx.GroupNorm, num_groups=GROUPS),
    "batch": partial(BatchNorm, momentum=0.9, epsilon=1e-5),
}


class Shape(NamedTuple):
    """The blocks of a residual network and their sizes."""

    block: Callable[..., nnx.Module]  # of (ins, outs, stride, norm, rngs)
    stem: int  # channels after the first convolution
    stages: Sequence[tuple[int, int]]  # output channels of each stage's blocks, and their number
    preactivated: bool = False  # norm and relu come before the convolutions of a block
    large_images: bool = False  # the first convolution is 7x7 with stride 2, and pooled


def conv(ins: int, outs: int, side: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    """A convolution without bias that starts from He's normal distribution."""
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


class Shortcut(nnx.Module):
    """A block's input, through a 1x1 convolution and a norm where the block changes its shape."""

    def __init__(self, ins: int, outs: int, stride: int, norm: str, rngs: nnx.Rngs) -> None:
        self.projects = stride != 1 or ins != outs
        if self.projects:
            self.conv_around = conv(ins, outs, 1, stride, rngs)
            self.norm_around = NORMS[norm](outs, rngs=rngs)

    def around(self, images: jax.Array) -> jax.Array:
        return self.norm_around(self.conv_around(images)) if self.projects else images


class Block(Shortcut):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, ins: int, outs: int, stride: int, norm: str, rngs: nnx.Rngs) -> None:
        self.conv1 = conv(ins, outs, 3, stride, rngs)
        self.norm1 = NORMS[norm](outs, rngs=rngs)
        self.conv2 = conv(outs, outs, 3, 1, rngs)
        self.norm2 = NORMS[norm](outs, rngs=rngs)
        super().__init__(ins, outs, stride, norm, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        inner = nnx.relu(self.norm1(self.conv1(images)))
        inner = self.norm2(self.conv2(inner))
        return nnx.relu(inner + self.around(images))


class Bottleneck(Shortcut):
    """Convolutions of 1x1, 3x3 and 1x1, the first two with a quarter of the channels, a shortcut.

    The stride is that of the 3x3 convolution.
    """

    def __init__(self, ins: int, outs: int, stride: int, norm: str, rngs: nnx.Rngs) -> None:
        inner = outs // EXPANSION
        self.conv1 = conv(ins, inner, 1, 1, rngs)
        self.norm1 = NORMS[norm](inner, rngs=rngs)
        self.conv2 = conv(inner, inner, 3, stride, rngs)
        self.norm2 = NORMS[norm](inner, rngs=rngs)
        self.conv3 = conv(inner, outs, 1, 1, rngs)
        self.norm3 = NORMS[norm](outs, rngs=rngs)
        super().__init__(ins, outs, stride, norm, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        inner = nnx.relu(self.norm1(self.conv1(images)))
        inner = nnx.relu(self.norm2(self.conv2(inner)))
        return nnx.relu(self.norm3(self.conv3(inner)) + self.around(images))


class PreactivatedBlock(nnx.Module):
    """`Block` with norm and relu before each convolution, and nothing after the sum.

    Where the shape changes, the shortcut is a 1x1 convolution of the first activation.
    """

    def __init__(self, ins: int, outs: int, stride: int, norm: str, rngs: nnx.Rngs) -> None:
        self.norm1 = NORMS[norm](ins, rngs=rngs)
        self.conv1 = conv(ins, outs, 3, stride, rngs)
        self.norm2 = NORMS[norm](outs, rngs=rngs)
        self.conv2 = conv(outs, outs, 3, 1, rngs)
        self.conv_around = conv(ins, outs, 1, stride, rngs) if (ins, stride) != (outs, 1) else None

    def __call__(self, images: jax.Array) -> jax.Array:
        active = nnx.relu(self.norm1(images))
        inner = self.conv2(nnx.relu(self.norm2(self.conv1(active))))
        return inner + (self.conv_around(active) if self.conv_around else images)


class PreactivatedBottleneck(nnx.Module):
    """`Bottleneck` with norm and relu before each convolution, and nothing after the sum.

    Where the shape changes, the shortcut is a 1x1 convolution of the first activation.
    """

    def __init__(self, ins: int, outs: int, stride: int, norm: str, rngs: nnx.Rngs) -> None:
        inner = outs // EXPANSION
        self.norm1 = NORMS[norm](ins, rngs=rngs)
        self.conv1 = conv(ins, inner, 1, 1, rngs)
        self.norm2 = NORMS[norm](inner, rngs=rngs)
        self.conv2 = conv(inner, inner, 3, stride, rngs)
        self.norm3 = NORMS[norm](inner, rngs=rngs)
        self.conv3 = conv(inner, outs, 1, 1, rngs)
        self.conv_around = conv(ins, outs, 1, stride, rngs) if (ins, stride) != (outs, 1) else None

    def __call__(self, images: jax.Array) -> jax.Array:
        active = nnx.relu(self.norm1(images))
        inner = self.conv2(nnx.relu(self.norm2(self.conv1(active))))
        inner = self.conv3(nnx.relu(self.norm3(inner)))
        return inner + (self.conv_around(active) if self.conv_around else images)


class ResNet(nnx.Module):
    """A first convolution, stages of blocks, a mean over pixels, a dense layer."""

    def __init__(
        self, channels: int, outputs: int, shape: Shape, norm: str, rngs: nnx.Rngs
    ) -> None:
        self.pools = shape.large_images
        side, stride = (7, 2) if shape.large_images else (3, 1)
        self.stem = conv(channels, shape.stem, side, stride, rngs)
        # Without a pooling in between, the norm of a pre-activated block follows at once.
        norms_stem = shape.large_images or not shape.preactivated
        self.norm = NORMS[norm](shape.stem, rngs=rngs) if norms_stem else None
        ins, blocks = shape.stem, []
        for stage, (outs, number) in enumerate(shape.stages):
            for position in range(number):
                stride = 2 if stage and not position else 1
                blocks.append(shape.block(ins, outs, stride, norm, rngs))
                ins = outs
        self.blocks = nnx.List(blocks)
        self.last_norm = NORMS[norm](ins, rngs=rngs) if shape.preactivated else None
        self.logits = Logits(ins, outputs, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        images = self.stem(images)
        if self.norm:
            images = nnx.relu(self.norm(images))
        if self.pools:
            images = max_pool(images, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block in self.blocks:
            images = block(images)
        if self.last_norm:
            images = nnx.relu(self.last_norm(images))
        return self.logits(images.mean((1, 2)))


def residual_network(
    model: str, input_shape: tuple[int, ...], outputs: int, shape: Shape, norm: str
) -> Model:
    """Make a residual network of a shape.

    Args:
      model: the model's name, for errors.
      input_shape: `(height, width, channels)` of one image.
      outputs: number of logits; with 1, outputs have shape `[batch]`.
      shape: the blocks and their sizes.
      norm: "layer", "group" or "batch".

    Returns:
      The model; its model state is {} unless the norm is "batch".

    Raises:
      ConfigurationError: an example is not an image, the norm is unknown, or 32 groups do not
        divide the channels of the first convolution, of which all others are multiples.

    >>> shape = Shape(Block, 16, [(16, 1), (32, 1)])
    >>> model = residual_network("tiny", (8, 8, 3), 10, shape, "layer")
    >>> params, _ = jax.eval_shape(model.init, jax.random.key(0))
    >>> sorted(params["blocks"]["1"])
    ['conv1', 'conv2', 'conv_around', 'norm1', 'norm2', 'norm_around']
    """
    _, _, channels = image_sides(model, input_shape)
    lookup("norm", norm, NORMS)
    if norm == "group" and shape.stem % GROUPS:
        raise ConfigurationError(f"{GROUPS} groups do not divide a width of {shape.stem} channels")
    return from_nnx(lambda rngs: ResNet(channels, outputs, shape, norm, rngs))
