"""A dataset: its sizes, and functions that read it."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data.checks import check_examples
from jaxlocal.data.examples import Examples, ExampleSource
from jaxlocal.errors import ConfigurationError


class Dataset(NamedTuple):
    """A dataset: its sizes, and functions that read it.

    `train_source()` and `test_source()` give the examples by number: inputs [*input_shape], uint8,
    float32 or int32 tokens; targets int32 or float32. Examples in files are read when needed.
    """

    name: str
    train_source: Callable[[], ExampleSource]
    test_source: Callable[[], ExampleSource]
    train_examples: int  # number of training examples
    test_examples: int  # number of test examples
    input_shape: tuple[int, ...]  # shape of one example
    classes: int  # number of classes; 0 for regression
    mean: tuple[float, ...] = (0.0,)  # of each channel
    scale: tuple[float, ...] = (1.0,)  # standard deviation of each channel
    start: NDArray[np.float32] | None = None  # [features], initial weights of its linear model
    normal: NDArray[np.float32] | None = None  # [features], unit normal of a separating hyperplane
    loss: str = ""  # "perceptron" or "squared_hinge"; else the usual one for its classes
    varying: bool = False  # images of varying size, which a stream resizes to `input_shape`

    def train(self) -> Examples:
        """Read all training examples: {"inputs": [n, *input_shape], "targets": [n]}."""
        return self._checked(self.train_source().examples())

    def test(self) -> Examples:
        """Read all test examples: {"inputs": [n, *input_shape], "targets": [n]}."""
        return self._checked(self.test_source().examples())

    def targets(self) -> NDArray[Any]:
        """Read the training targets [n], without decoding an image."""
        targets = self.train_source().targets()
        check_examples(self.name, {"targets": targets}, self.classes)
        return targets

    def distances(self) -> NDArray[np.float32]:
        """The signed distances [n] of the training examples to the separating hyperplane.

        Raises:
          ConfigurationError: the dataset defines no such hyperplane through the origin.
        """
        if self.normal is None:
            raise ConfigurationError(
                f"dataset {self.name!r} defines no separating hyperplane, to which its examples "
                "have a distance"
            )
        inputs: NDArray[np.float32] = self.train()["inputs"]
        return inputs @ self.normal

    def _checked(self, examples: Examples) -> Examples:
        check_examples(self.name, examples, self.classes)
        return examples

    def normalize(self, inputs: Any) -> Any:
        """Normalize stored inputs to the float32 inputs of a model: (inputs - mean) / scale.

        uint8 inputs are first divided by 255. int32 tokens are returned as they are.

        Args:
          inputs: [..., *input_shape], a NumPy or a JAX array.

        Returns:
          An array of the same kind and shape.
        """
        if inputs.dtype == np.int32:
            return inputs
        values = inputs.astype(np.float32)
        if inputs.dtype == np.uint8:
            values = values / np.float32(255)
        by_channel = lambda x: np.asarray(x, np.float32).reshape(
            (1,) * (values.ndim - np.ndim(x)) + np.shape(x)
        )
        return (values - by_channel(self.mean)) / by_channel(self.scale)


class Request(NamedTuple):
    """What is asked of `load`."""

    spec: str
    argument: str | None  # what follows the colon
    data_dir: str | os.PathLike[str] | None
    seed: int
    image_size: int | None  # in pixels, of images of varying size
