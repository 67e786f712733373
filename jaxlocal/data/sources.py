"""Datasets: real ones and synthetic problems. Their sizes are known before any example is read.

| name | dataset |
|---|---|
| `digits` | scikit-learn's 8x8 digits, which need no download |
| `docstrings`, `docstrings:LENGTH` | Python's docstrings, in sequences of LENGTH characters |
| `mnist`, `cifar10` | MNIST and CIFAR-10 as TensorFlow Datasets prepared them |
| `NAME`, `NAME/CONFIG` | another dataset of TensorFlow Datasets, of labelled images of one size |
| `mnist_binary` | MNIST with class 1 for the digits 0 to 4 and class 0 for 5 to 9 |
| `least_squares` | Gaussian inputs, and a linear target with noise |
| `perceptron` | two linearly separable classes with a margin |
| `two_quadratics`, `two_quadratics:R` | two examples on which Local SGD needs more than R rounds |
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data.checks import check_examples, check_name, check_whole
from jaxlocal.data.examples import ArraySource, Examples, ExampleSource
from jaxlocal.data.prepared import find, require
from jaxlocal.errors import ConfigurationError, unknown

# The second entry of every seed in `jaxlocal.data` is distinct: other files use 1 to 6.
_SYNTHESIS = 0

_SYNTHETIC_TRAIN, _SYNTHETIC_TEST, _SYNTHETIC_FEATURES = 4096, 1024, 32
_NOISE = 0.1
_MARGIN = 0.5

# Mean and standard deviation of each channel over the training pixels, as fractions of 255.
_PIXELS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


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


class _Request(NamedTuple):
    spec: str
    argument: str | None  # what follows the colon
    data_dir: str | os.PathLike[str] | None
    seed: int


def load(spec: str, data_dir: str | os.PathLike[str] | None = None, seed: int = 0) -> Dataset:
    """Load a dataset by its name. Only its sizes are read; `train` and `test` read the examples.

    Args:
      spec: one of `DATASETS`, with an argument for `docstrings` and `two_quadratics`, see
        `jaxlocal.data.sources`; or NAME or NAME/CONFIG of another dataset of TensorFlow Datasets.
        Of the latter, the test set is the split test, else validation, and the label is the
        feature "label", else the only label.
      data_dir: folder of datasets that TensorFlow Datasets prepared; by default the environment
        variable TFDS_DATA_DIR, else the default of TensorFlow Datasets.
      seed: seed of a synthetic problem, not negative. Real datasets and their splits do not depend
        on it.

    Returns:
      The dataset.

    Raises:
      ConfigurationError: the name is unknown, the dataset is not prepared or does not hold labelled
        images of one size, or a package is not installed. Reading damaged files raises it too.

    >>> data = load("least_squares", seed=1)
    >>> data.train_examples, data.input_shape, data.train()["targets"].shape
    (4096, (32,), (4096,))
    """
    check_name("a dataset", spec)
    check_whole(0, seed=seed)
    name, colon, argument = spec.partition(":")
    request = _Request(spec, argument if colon else None, data_dir, seed)
    if name not in _SOURCES:
        if not importlib.util.find_spec("tensorflow_datasets"):
            raise ConfigurationError(
                f"{unknown('dataset', spec, DATASETS)}, and those of tensorflow-datasets, which is "
                "not installed"
            )
        return _prepared(request)
    if colon and name not in ("docstrings", "two_quadratics"):
        raise ConfigurationError(f"dataset {name!r} takes no argument, got {spec!r}")
    return _SOURCES[name](request)


def _digits(request: _Request) -> Dataset:
    require("digits", "scikit-learn", "sklearn")

    def read(held_out: bool) -> ArraySource:
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Every fifth example of each label, in order: stratified, and the same in every version.
        chosen = np.zeros(len(digits.target), bool)
        chosen[np.argsort(digits.target, kind="stable")[::5]] = True
        chosen = chosen == held_out
        images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        return ArraySource(
            {"inputs": images[..., None], "targets": digits.target[chosen].astype(np.int32)}
        )

    return Dataset(
        request.spec, lambda: read(False), lambda: read(True), 1437, 360, (8, 8, 1), classes=10
    )


def _mnist_binary(request: _Request) -> Dataset:
    classes = tuple(int(digit <= 4) for digit in range(10))
    data = _prepared(request._replace(spec="mnist"), classes)
    return data._replace(name=request.spec, classes=2)


def _prepared(request: _Request, classes: tuple[int, ...] = ()) -> Dataset:
    """A dataset of TensorFlow Datasets; `classes`, if any, are the classes of its labels."""
    name = request.spec
    require(name, "tensorflow-datasets", "tensorflow_datasets")
    require(name, "array_record", "array_record")
    require(name, "Pillow", "PIL", "cv2")
    found = find(name, request.data_dir, DATASETS)
    train, test = replace(found.train, classes=classes), replace(found.test, classes=classes)
    mean, scale = _PIXELS.get(name, ((0.0,), (1.0,)))
    return Dataset(
        name,
        lambda: train,
        lambda: test,
        len(train),
        len(test),
        found.input_shape,
        found.classes,
        mean,
        scale,
    )


def _docstrings(request: _Request) -> Dataset:
    from jaxlocal.data import text

    argument = "128" if request.argument is None else request.argument
    if not argument.isdecimal():
        raise ConfigurationError(f"the length in {request.spec!r} must be a positive whole number")
    length = int(argument)
    train, test = (ArraySource(part) for part in text.load_docstrings(length))
    return Dataset(
        request.spec,
        lambda: train,
        lambda: test,
        len(train),
        len(test),
        (length,),
        classes=text.VOCABULARY,
    )


def _least_squares(request: _Request) -> Dataset:
    def make(
        generator: np.random.Generator, inputs: NDArray[Any], direction: NDArray[Any]
    ) -> Examples:
        targets = inputs @ direction + _NOISE * generator.normal(size=len(inputs))
        return _float32(inputs, targets)

    return _synthetic(request, make, classes=0)


def _perceptron(request: _Request) -> Dataset:
    def make(
        generator: np.random.Generator, inputs: NDArray[Any], direction: NDArray[Any]
    ) -> Examples:
        sides = np.where(inputs @ direction >= 0, 1.0, -1.0)
        inputs = inputs + _MARGIN * sides[:, None] * direction
        return {"inputs": inputs.astype(np.float32), "targets": (sides > 0).astype(np.int32)}

    return _synthetic(request, make, classes=2)


def _synthetic(
    request: _Request, make: Callable[[Any, NDArray[Any], NDArray[Any]], Examples], classes: int
) -> Dataset:
    """A problem whose examples `make` computes from Gaussian inputs and a unit direction."""

    def read(part: slice) -> ArraySource:
        generator = np.random.default_rng((request.seed, _SYNTHESIS))
        direction = generator.normal(size=_SYNTHETIC_FEATURES)
        direction /= np.linalg.norm(direction)
        shape = (_SYNTHETIC_TRAIN + _SYNTHETIC_TEST, _SYNTHETIC_FEATURES)
        examples = make(generator, generator.normal(size=shape), direction)
        return ArraySource({key: values[part] for key, values in examples.items()})

    return Dataset(
        name=request.spec,
        train_source=lambda: read(slice(_SYNTHETIC_TRAIN)),
        test_source=lambda: read(slice(_SYNTHETIC_TRAIN, None)),
        train_examples=_SYNTHETIC_TRAIN,
        test_examples=_SYNTHETIC_TEST,
        input_shape=(_SYNTHETIC_FEATURES,),
        classes=classes,
    )


def _two_quadratics(request: _Request) -> Dataset:
    """Two unit vectors a_1, a_2 with cosine 1 - 1/(R + 1/2); example i has loss (a_i . x)^2 / 2.

    Local SGD on two workers starts at the unit vector along a_1 - a_2. In R rounds, with any number
    of local steps and any step size up to 1, its loss stays above 1/(4e(R + 1/2)). The test set is
    the training set.

    Reference: Qin, Etesami, Uribe, "Faster Convergence of Local SGD for Over-Parameterized Models",
    TMLR 2024, https://arxiv.org/abs/2201.12719 (the instance is derived here)
    """
    text = "1000" if request.argument is None else request.argument
    if not text.isdecimal() or int(text) < 1:
        raise ConfigurationError(f"the rounds in {request.spec!r} must be a positive whole number")
    apart = 1 / (int(text) + 0.5)  # 1 - cosine
    along, across = np.sqrt(1 - apart / 2), np.sqrt(apart / 2)

    def read() -> ArraySource:
        inputs = np.array([[along, across], [along, -across]])
        return ArraySource(_float32(inputs, np.zeros(2)))

    start = np.array([0.0, 1.0], np.float32)
    return Dataset(request.spec, read, read, 2, 2, (2,), classes=0, start=start)


def _float32(inputs: NDArray[Any], targets: NDArray[Any]) -> Examples:
    return {"inputs": inputs.astype(np.float32), "targets": targets.astype(np.float32)}


_SOURCES: Mapping[str, Callable[[_Request], Dataset]] = {
    "digits": _digits,
    "docstrings": _docstrings,
    "mnist": _prepared,
    "mnist_binary": _mnist_binary,
    "cifar10": _prepared,
    "least_squares": _least_squares,
    "perceptron": _perceptron,
    "two_quadratics": _two_quadratics,
}
DATASETS = tuple(_SOURCES)
