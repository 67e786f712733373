"""The models as a user of Flax writes them, from plain layers of Flax alone.

Their parameters have the names of those of `jaxlocal.models`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
from flax import nnx

from experiments.benchmarks.workloads import Workload
from jaxlocal.models import Model, from_nnx
from jaxlocal.models.simple import HIDDEN

Norm = partial(nnx.GroupNorm, num_groups=1)


class Logistic(nnx.Module):
    def __init__(self, shape: Sequence[int], outputs: int, rngs: nnx.Rngs):
        features = shape[0] * shape[1] * shape[2]
        self.map = nnx.Linear(features, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.map(x.reshape(len(x), -1))


class Perceptron(nnx.Module):
    def __init__(self, shape: Sequence[int], outputs: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(shape[0] * shape[1] * shape[2], HIDDEN, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.logits = nnx.Linear(HIDDEN, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.first(x.reshape(len(x), -1)))
        return self.logits(nnx.relu(self.second(x)))


class Cnn(nnx.Module):
    def __init__(self, shape: Sequence[int], outputs: int, rngs: nnx.Rngs):
        height, width, channels = shape
        self.first = nnx.Conv(channels, 10, (5, 5), rngs=rngs)
        self.second = nnx.Conv(10, 20, (5, 5), rngs=rngs)
        self.hidden = nnx.Linear(20 * (height // 4) * (width // 4), 100, rngs=rngs)
        self.logits = nnx.Linear(100, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.first(x)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.second(x)), (2, 2), (2, 2))
        return self.logits(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def _conv(ins: int, outs: int, side: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    pad = side // 2
    return nnx.Conv(ins, outs, (side, side), stride, padding=pad, use_bias=False, rngs=rngs)


class ResidualBlock(nnx.Module):
    def __init__(self, ins: int, outs: int, stride: int, rngs: nnx.Rngs):
        self.conv1, self.norm1 = _conv(ins, outs, 3, stride, rngs), Norm(outs, rngs=rngs)
        self.conv2, self.norm2 = _conv(outs, outs, 3, 1, rngs), Norm(outs, rngs=rngs)
        self.projects = stride != 1 or ins != outs
        if self.projects:
            self.conv_around = _conv(ins, outs, 1, stride, rngs)
            self.norm_around = Norm(outs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = nnx.relu(self.norm1(self.conv1(x)))
        inner = self.norm2(self.conv2(inner))
        return nnx.relu(inner + (self.norm_around(self.conv_around(x)) if self.projects else x))


class ResNet(nnx.Module):
    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        rngs: nnx.Rngs,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: int = 2,
    ):
        ins, made = widths[0], []
        self.stem, self.norm = _conv(shape[2], ins, 3, 1, rngs), Norm(ins, rngs=rngs)
        for stage, outs in enumerate(widths):
            for number in range(blocks):
                stride = 2 if stage and not number else 1
                made.append(ResidualBlock(ins, outs, stride, rngs))
                ins = outs
        self.blocks = nnx.List(made)
        self.logits = nnx.Linear(ins, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.logits(x.mean((1, 2)))


class Attention(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.queries_keys_values = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        parts = self.queries_keys_values(x).reshape(batch, length, 3, self.heads, -1)
        mixed = jax.nn.dot_product_attention(
            parts[:, :, 0], parts[:, :, 1], parts[:, :, 2], is_causal=True
        )
        return self.out(mixed.reshape(batch, length, width))


class TransformerBlock(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        rngs: nnx.Rngs,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
    ):
        normal = nnx.initializers.normal()
        self.tokens = nnx.Param(normal(rngs.params(), (outputs, width)))
        self.positions = nnx.Param(normal(rngs.params(), (shape[0], width)))
        self.blocks = nnx.List([TransformerBlock(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.logits = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.tokens[...][x] + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


MODULES: dict[str, Callable[..., nnx.Module]] = {
    "logistic": Logistic,
    "mlp": Perceptron,
    "mll_cnn": Cnn,
    "resnet18_layer_norm": ResNet,
    "small_resnet_layer_norm": partial(ResNet, widths=(16, 32, 64), blocks=1),
    "transformer": Transformer,
    "small_transformer": partial(Transformer, layers=2, width=64, heads=2),
}


def flax_model(workload: Workload) -> Model:
    """Build the model of a workload from plain layers; logits are [batch, outputs]."""
    make = MODULES[workload.model]
    shapes = (workload.input_shape, workload.outputs)
    return from_nnx(lambda rngs: make(*shapes, rngs, *workload.sizes))
