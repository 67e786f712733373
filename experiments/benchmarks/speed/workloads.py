"""What every contender trains: the same models on the same examples in the same order."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlocal.models import Model, build
from jaxlocal.types import Tree

LEARNING_RATE = 0.05  # of plain SGD


class Workload(NamedTuple):
    """A round of so many workers."""

    name: str
    model: str  # of jaxlocal.models
    workers: int
    batch_size: int  # examples of one worker at a step
    steps: int
    input_shape: tuple[int, ...]  # of an image, or the length of a sequence of tokens
    outputs: int
    examples: int = 60_000  # in the pool that batches are taken from

    @property
    def classes(self) -> int:
        return max(2, self.outputs)

    @property
    def title(self) -> str:
        """
        >>> WORKLOADS["mll_cnn"].title
        'mll_cnn, 20 workers × 32, 8 steps'
        """
        return f"{self.name}, {self.workers} workers × {self.batch_size}, {self.steps} steps"


_DIGITS, _CHARACTERS = (28, 28, 1), 97
WORKLOADS = {
    w.name: w
    for w in (
        Workload("logistic", "logistic", 100, 300, 8, _DIGITS, 1),
        Workload("softmax", "logistic", 100, 300, 8, _DIGITS, 10),
        Workload("mlp", "mlp", 64, 32, 8, _DIGITS, 10),
        Workload("mll_cnn", "mll_cnn", 20, 32, 8, _DIGITS, 62),
        Workload("resnet18", "resnet18_layer_norm", 8, 8, 2, (32, 32, 3), 10, 50_000),
        Workload("transformer", "transformer", 8, 4, 2, (128,), _CHARACTERS, 9_000),
    )
}


def model_of(workload: Workload) -> Model:
    """The library's model."""
    return build(workload.model, workload.input_shape, workload.outputs)


def example_shapes(workload: Workload, lead: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """So many examples: uint8 images with a class each, or tokens with a class at each place."""
    tokens = len(workload.input_shape) == 1
    inputs = (*lead, *workload.input_shape)
    return {
        "inputs": jax.ShapeDtypeStruct(inputs, np.int32 if tokens else np.uint8),
        "targets": jax.ShapeDtypeStruct(inputs if tokens else lead, np.int32),
    }


def make_pool(workload: Workload) -> dict[str, np.ndarray]:
    """Random examples."""
    rng = np.random.default_rng(0)
    shapes = example_shapes(workload, (workload.examples,))
    most = {"inputs": workload.outputs if len(workload.input_shape) == 1 else 256}
    return {
        name: rng.integers(0, most.get(name, workload.classes), x.shape, x.dtype)
        for name, x in shapes.items()
    }


def make_indices(workload: Workload, turn: int) -> np.ndarray:
    """The examples of a round, int32 [steps, workers, batch]."""
    size = (workload.steps, workload.workers, workload.batch_size)
    return np.random.default_rng(turn + 1).integers(0, workload.examples, size, np.int32)


def initial_params(workload: Workload) -> Tree:
    """The parameters that all workers start from, arrays of the host."""
    return jax.device_get(jax.jit(model_of(workload).init)(jax.random.key(0))[0])


def scaled(inputs: Any) -> Any:
    """What enters a model: images from 0 to 1, tokens as they are."""
    return inputs.astype(np.float32) / np.float32(255) if inputs.dtype == np.uint8 else inputs
