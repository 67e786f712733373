"""The workloads of the benchmarks: all contenders train the same models on the same examples in the
same order."""

import json
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxlocal
from jaxlocal.errors import lookup
from jaxlocal.models import MODELS, Model
from jaxlocal.models.supervised import training_loss
from jaxlocal.stages.gradient import GradFn
from jaxlocal.types import Tree

LEARNING_RATE = 0.05  # of SGD without momentum
ADAMW_RATE = 1e-3  # learning rate of AdamW


class Workload(NamedTuple):
    """The model, the workers and the examples of one round."""

    name: str
    model: str  # a name in jaxlocal.models
    workers: int
    batch_size: int  # examples of one worker in one step
    steps: int  # of one round
    input_shape: tuple[int, ...]  # of an image, or the length of a sequence of tokens
    outputs: int
    examples: int = 60_000  # in the pool that batches are drawn from
    method: str = "local_sgd"  # with SGD, or "diloco", with AdamW
    sizes: tuple[int, ...] = ()  # of the model, such as layers and width; by default its own

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


def workload_to_json(workload: Workload) -> str:
    """Write a workload's fields as JSON, for the command line of a contender."""
    return json.dumps(workload._asdict())


def parse_workload(text: str) -> Workload:
    """Read a workload from its name or from its fields in JSON.

    Raises:
      ConfigurationError: no workload has that name.

    >>> parse_workload(workload_to_json(WORKLOADS["mlp"])) == parse_workload("mlp")
    True
    """
    if not text.startswith("{"):
        return lookup("workload", text, WORKLOADS)
    fields: dict[str, Any] = json.loads(text)
    whole = {name: tuple(fields[name]) for name in ("input_shape", "sizes")}
    return Workload(**{**fields, **whole})


def model_of(workload: Workload) -> Model:
    """Build the library's model of a workload."""
    make = lookup("model", workload.model, MODELS)
    return make(workload.input_shape, workload.outputs, *workload.sizes)


def gradient_of(workload: Workload) -> GradFn:
    """Build the gradient function of the library's model of a workload."""
    loss = training_loss(model_of(workload), scaled, workload.classes)
    return jaxlocal.gradients(loss, stateful=True)


def initial_params(workload: Workload) -> Tree:
    """Initialise the parameters that all workers start from, as arrays on the host."""
    return jax.device_get(model_of(workload).init(jax.random.key(0))[0])


def param_shapes(workload: Workload) -> Tree:
    """Shapes of the parameters of a workload's model."""
    return jax.eval_shape(model_of(workload).init, jax.random.key(0))[0]


def example_shapes(workload: Workload, lead: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of examples: uint8 images with one class each, or tokens with a class per position.

    Args:
      workload: whose examples.
      lead: leading axes, such as [examples] or [steps, workers, batch].
    """
    tokens = len(workload.input_shape) == 1
    inputs = (*lead, *workload.input_shape)
    return {
        "inputs": jax.ShapeDtypeStruct(inputs, np.int32 if tokens else np.uint8),
        "targets": jax.ShapeDtypeStruct(inputs if tokens else lead, np.int32),
    }


def make_pool(workload: Workload) -> dict[str, np.ndarray]:
    """Draw the random examples that batches are taken from, leaves [examples, ...]."""
    rng = np.random.default_rng(0)
    shapes = example_shapes(workload, (workload.examples,))
    limits = {"inputs": workload.outputs if len(workload.input_shape) == 1 else 256}
    return {
        name: rng.integers(0, limits.get(name, workload.classes), x.shape, x.dtype)
        for name, x in shapes.items()
    }


def make_indices(workload: Workload, round_number: int) -> np.ndarray:
    """Draw the indices of a round's examples in the pool, int32 [steps, workers, batch]."""
    size = (workload.steps, workload.workers, workload.batch_size)
    return np.random.default_rng(round_number + 1).integers(0, workload.examples, size, np.int32)


def scaled(inputs: Any) -> Any:
    """Scale uint8 images to [0, 1]; tokens remain as they are."""
    return inputs.astype(np.float32) / np.float32(255) if inputs.dtype == np.uint8 else inputs
