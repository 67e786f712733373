"""The models in PyTorch, with its own layers and channels before pixels.

Their parameters have the names of those of `jaxlocal.models`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.benchmarks.workloads import Workload
from jaxlocal.models.simple import HIDDEN
from jaxlocal.types import Tree

EPSILON = 1e-6  # of Flax's normalisation layers


class ResidualBlock(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int):
        super().__init__()
        conv = partial(nn.Conv2d, bias=False)
        self.conv1 = conv(ins, outs, 3, stride, padding=1)
        self.norm1 = nn.GroupNorm(1, outs, EPSILON)
        self.conv2 = conv(outs, outs, 3, padding=1)
        self.norm2 = nn.GroupNorm(1, outs, EPSILON)
        self.projects = stride != 1 or ins != outs
        if self.projects:
            self.conv_around = conv(ins, outs, 1, stride)
            self.norm_around = nn.GroupNorm(1, outs, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        inner = self.norm2(self.conv2(inner))
        around = self.norm_around(self.conv_around(x)) if self.projects else x
        return functional.relu(inner.add_(around), inplace=True)


class ResNet(nn.Module):
    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: int = 2,
    ):
        super().__init__()
        ins = widths[0]
        self.stem = nn.Conv2d(shape[2], ins, 3, padding=1, bias=False)
        self.norm, self.blocks = nn.GroupNorm(1, ins, EPSILON), nn.Sequential()
        for stage, outs in enumerate(widths):
            for number in range(blocks):
                self.blocks.append(ResidualBlock(ins, outs, 2 if stage and not number else 1))
                ins = outs
        self.logits = nn.Linear(ins, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)), inplace=True)
        return self.logits(self.blocks(x).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.queries_keys_values(x).view(batch, length, 3, self.heads, -1)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4).unbind()
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, EPSILON), nn.LayerNorm(width, EPSILON)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Transformer(nn.Module):
    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
    ):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(outputs, width))
        self.positions = nn.Parameter(torch.empty(shape[0], width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm, self.logits = nn.LayerNorm(width, EPSILON), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.embedding(x, self.tokens) + self.positions
        return self.logits(self.norm(self.blocks(x)))


def _logistic(shape: Sequence[int], outputs: int) -> nn.Module:
    return _named(flat=nn.Flatten(), map=nn.Linear(int(np.prod(shape)), outputs))


def _perceptron(shape: Sequence[int], outputs: int) -> nn.Module:
    return _named(
        flat=nn.Flatten(),
        first=nn.Linear(int(np.prod(shape)), HIDDEN),
        relu1=nn.ReLU(inplace=True),
        second=nn.Linear(HIDDEN, HIDDEN),
        relu2=nn.ReLU(inplace=True),
        logits=nn.Linear(HIDDEN, outputs),
    )


def _cnn(shape: Sequence[int], outputs: int) -> nn.Module:
    height, width, channels = shape
    return _named(
        first=nn.Conv2d(channels, 10, 5, padding=2),
        relu1=nn.ReLU(inplace=True),
        pool1=nn.MaxPool2d(2),
        second=nn.Conv2d(10, 20, 5, padding=2),
        relu2=nn.ReLU(inplace=True),
        pool2=nn.MaxPool2d(2),
        flat=nn.Flatten(),
        hidden=nn.Linear(20 * (height // 4) * (width // 4), 100),
        relu3=nn.ReLU(inplace=True),
        logits=nn.Linear(100, outputs),
    )


def _named(**layers: nn.Module) -> nn.Module:
    """A sequence of layers with names."""
    made = nn.Sequential()
    for name, layer in layers.items():
        made.add_module(name, layer)
    return made


MODULES: dict[str, Any] = {
    "logistic": _logistic,
    "mlp": _perceptron,
    "mll_cnn": _cnn,
    "resnet18_layer_norm": ResNet,
    "small_resnet_layer_norm": partial(ResNet, widths=(16, 32, 64), blocks=1),
    "transformer": Transformer,
    "small_transformer": partial(Transformer, layers=2, width=64, heads=2),
}


def torch_model(workload: Workload, params: Tree) -> nn.Module:
    """Build the PyTorch model of a workload with the parameters of jaxlocal's model.

    Args:
      workload: whose model.
      params: of `initial_params`, arrays on the host.
    """
    module = MODULES[workload.model](workload.input_shape, workload.outputs, *workload.sizes)
    values = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        if _follows_pixels(path, workload):
            value = _channels_first_rows(value, workload)
        values[_torch_name(path)] = torch.tensor(_outputs_first(path[-1].key, value))
    module.load_state_dict(values)
    return module


def named_params(
    workload: Workload, module: nn.Module, values: Sequence[Tensor], like: Tree
) -> Tree:
    """Parameters of a PyTorch model in the tree and the layouts of jaxlocal's model.

    Args:
      workload: whose model.
      module: of `torch_model`.
      values: of the module's parameters, in their order.
      like: a tree of jaxlocal's parameters.
    """
    named = {name: x for (name, _), x in zip(module.named_parameters(), values, strict=True)}

    def convert(path: Any, _: Any) -> np.ndarray:
        value = named[_torch_name(path)].detach().cpu().numpy()
        value = _outputs_last(path[-1].key, value)
        return _channels_last_rows(value, workload) if _follows_pixels(path, workload) else value

    return jax.tree_util.tree_map_with_path(convert, like)


_NAMES = {"kernel": "weight", "scale": "weight"}


def _torch_name(path: Any) -> str:
    """The name in PyTorch of the parameter at a path of jaxlocal's tree."""
    *layers, name = (str(part.key) for part in path)
    return ".".join((*layers, _NAMES.get(name, name)))


def _follows_pixels(path: Any, workload: Workload) -> bool:
    """Whether the rows of a kernel follow the order of pixels and channels."""
    names = [part.key for part in path]
    return workload.model == "mll_cnn" and names == ["hidden", "kernel"]


def _outputs_first(name: str, value: np.ndarray) -> np.ndarray:
    """Move the last axis of kernels [height, width, in, out] and [in, out] to the front."""
    if name != "kernel":
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def _outputs_last(name: str, value: np.ndarray) -> np.ndarray:
    """The inverse of `_outputs_first`."""
    if name != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _channels_first_rows(kernel: np.ndarray, workload: Workload) -> np.ndarray:
    """Reorder the rows of a layer on flattened images from channels last to channels first."""
    height, width, _ = workload.input_shape
    images = kernel.reshape(height // 4, width // 4, -1, kernel.shape[1])
    return images.transpose(2, 0, 1, 3).reshape(kernel.shape)


def _channels_last_rows(kernel: np.ndarray, workload: Workload) -> np.ndarray:
    """The inverse of `_channels_first_rows`."""
    height, width, _ = workload.input_shape
    images = kernel.reshape(-1, height // 4, width // 4, kernel.shape[1])
    return images.transpose(1, 2, 0, 3).reshape(kernel.shape)
