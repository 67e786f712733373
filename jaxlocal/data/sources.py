"""Sources: real datasets and synthetic problems, described at once and read when asked.

| name | what |
|---|---|
| `digits` | scikit-learn's 8x8 digits, nothing to download |
| `mnist`, `cifar10` | as TensorFlow Datasets prepared them, in array_record files |
| `mnist_binary` | MNIST with class 1 for the digits 0 to 4 and class 0 for 5 to 9 |
| `least_squares` | Gaussian inputs, a linear target with noise |
| `perceptron` | two linearly separable classes with a margin |
| `two_quadratics`, `two_quadratics:R` | the two examples that make Local SGD slow over R rounds |
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxlocal.errors import ConfigurationError, lookup

Examples = dict[str, NDArray]

# The purposes of random numbers are distinct over this package: partitions 1, batches 2 to 4.
_SYNTHESIS = 0

_SYNTHETIC_TRAIN, _SYNTHETIC_TEST, _SYNTHETIC_FEATURES = 4096, 1024, 32
_NOISE = 0.1
_MARGIN = 0.5


class Dataset(NamedTuple):
    """A dataset: its sizes, and how to read it."""

    name: str
    train: Callable[[], Examples]
    """Reads {"inputs": [n, *input_shape] uint8 or float32, "targets": [n] int32 or float32}."""
    test: Callable[[], Examples]
    train_examples: int
    test_examples: int
    input_shape: tuple[int, ...]
    classes: int  # 0 for regression
    mean: tuple[float, ...] = (0.0,)  # over channels
    scale: tuple[float, ...] = (1.0,)  # over channels
    start: NDArray[np.float32] | None = None  # [features], where its linear model starts

    def normalize(self, inputs: Any) -> Any:
        """What enters the model, float32: (inputs / 255 if they are uint8, less mean) / scale.

        Inputs may be a numpy or a JAX array; the result is of the same kind.
        """
        values = inputs.astype(np.float32)
        if inputs.dtype == np.uint8:
            values = values / np.float32(255)
        return (values - np.asarray(self.mean, np.float32)) / np.asarray(self.scale, np.float32)


class _Request(NamedTuple):
    spec: str
    argument: str | None  # what follows the colon
    data_dir: str | os.PathLike[str] | None
    seed: int


def load(spec: str, data_dir: str | os.PathLike[str] | None = None, seed: int = 0) -> Dataset:
    """The dataset of a name; its `train` and `test` read it, anew at each call.

    Args:
      spec: one of DATASETS, `two_quadratics` with an argument if wanted.
      data_dir: where TensorFlow Datasets keeps what it prepared; by default TFDS_DATA_DIR, or
        its own default.
      seed: of a synthetic problem; not of the real ones nor of their splits.

    Raises:
      ConfigurationError: an unknown name, a dataset that is not prepared, a package that is not
        installed. `train` and `test` raise it for files that are damaged.

    >>> data = load("least_squares", seed=1)
    >>> data.train_examples, data.input_shape, data.train()["targets"].shape
    (4096, (32,), (4096,))
    """
    name, colon, argument = spec.partition(":")
    source = lookup("dataset", name, _SOURCES)
    if colon and name != "two_quadratics":
        raise ConfigurationError(f"dataset {name!r} takes no argument, got {spec!r}")
    if seed < 0:
        raise ConfigurationError(f"seed must not be negative, got {seed}")
    return source(_Request(spec, argument if colon else None, data_dir, seed))


def _digits(request: _Request) -> Dataset:
    _require("digits", "scikit-learn", "sklearn")

    def read(held_out: bool) -> Examples:
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Every fifth example of each label, in order: stratified, and the same in every version.
        chosen = np.zeros(len(digits.target), bool)
        chosen[np.argsort(digits.target, kind="stable")[::5]] = True
        chosen = chosen == held_out
        images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        return {"inputs": images[..., None], "targets": digits.target[chosen].astype(np.int32)}

    return Dataset(
        request.spec, lambda: read(False), lambda: read(True), 1437, 360, (8, 8, 1), classes=10
    )


def _mnist(request: _Request) -> Dataset:
    return _prepared("mnist", request)


def _cifar10(request: _Request) -> Dataset:
    mean, scale = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return _prepared("cifar10", request)._replace(mean=mean, scale=scale)


def _mnist_binary(request: _Request) -> Dataset:
    mnist = _prepared("mnist", request)

    def binary(examples: Examples) -> Examples:
        return examples | {"targets": (examples["targets"] <= 4).astype(np.int32)}

    return mnist._replace(
        train=lambda: binary(mnist.train()), test=lambda: binary(mnist.test()), classes=2
    )


def _prepared(name: str, request: _Request) -> Dataset:
    """Images from the files that TensorFlow Datasets prepared; reading them needs no TensorFlow."""
    _require(request.spec, "tensorflow-datasets", "tensorflow_datasets")
    _require(request.spec, "array_record", "array_record")
    _require(request.spec, "Pillow", "PIL", "cv2")
    builder = _find(name, request.data_dir)
    splits, features = builder.info.splits, builder.info.features
    return Dataset(
        name=request.spec,
        train=lambda: _read(name, builder, "train"),
        test=lambda: _read(name, builder, "test"),
        train_examples=splits["train"].num_examples,
        test_examples=splits["test"].num_examples,
        input_shape=tuple(features["image"].shape),
        classes=features["label"].num_classes,
    )


def _find(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """The builder of a dataset that is prepared, or one sentence; never a wait on the network."""
    import tensorflow_datasets as tfds

    # TensorFlow Datasets reads the variable only once, when it is first imported.
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    try:
        builder = tfds.builder(name, data_dir=root)
    except Exception as error:  # its parsers raise kinds of their own
        raise _damaged(name, root or "its default folder", error) from error
    folder = Path(builder.data_path)
    if not (folder / "dataset_info.json").exists():
        raise _unprepared(name, folder)
    kind = builder.info.file_format.value
    if kind not in ("array_record", "parquet"):
        raise ConfigurationError(
            f"{name} in {folder} is prepared as {kind}, which cannot be read without TensorFlow: "
            + _how_to_prepare(name)
        )
    for split in ("train", "test"):
        if split not in builder.info.splits:
            raise _damaged(name, folder, LookupError(f"no split {split!r}"))
        for path in builder.info.splits[split].filepaths:
            if not path.exists():
                raise _damaged(name, folder, FileNotFoundError(f"{path.name} is missing"))
    return builder


def _read(name: str, builder: Any, split: str) -> Examples:
    try:
        source = builder.as_data_source(split=split)
        examples = source.__getitems__(range(len(source)))
        return {
            "inputs": np.stack([example["image"] for example in examples]),
            "targets": np.array([example["label"] for example in examples], np.int32),
        }
    except Exception as error:  # array_record, protobuf and Pillow raise kinds of their own
        raise _damaged(name, builder.data_path, error) from error


def _require(dataset: str, package: str, *modules: str) -> None:
    """One sentence, at once, if none of the modules that would serve is installed."""
    if not any(importlib.util.find_spec(module) for module in modules):
        raise ConfigurationError(
            f"dataset {dataset!r} needs {package}, which is not installed: "
            "pip install 'jaxlocal[experiments]'"
        )


def _how_to_prepare(name: str) -> str:
    call = f"tfds.builder('{name}', data_dir='FOLDER')"
    call += ".download_and_prepare(file_format='array_record')"
    return (
        "on a machine with a network run pip install tensorflow-datasets tensorflow "
        f'importlib_resources and python -c "import tensorflow_datasets as tfds; {call}", '
        "then point --data_dir or TFDS_DATA_DIR at FOLDER"
    )


def _unprepared(name: str, folder: Path) -> ConfigurationError:
    return ConfigurationError(f"{name} is not prepared in {folder}: {_how_to_prepare(name)}")


def _damaged(name: str, folder: Any, error: Exception) -> ConfigurationError:
    cause = " ".join(str(error).split())[:200] or type(error).__name__
    return ConfigurationError(
        f"the files of {name} in {folder} are damaged ({cause}): delete them and prepare them "
        "anew, or point --data_dir at a folder where they are whole"
    )


def _least_squares(request: _Request) -> Dataset:
    def make(generator: np.random.Generator, inputs: NDArray, direction: NDArray) -> Examples:
        targets = inputs @ direction + _NOISE * generator.normal(size=len(inputs))
        return _float32(inputs, targets)

    return _synthetic(request, make, classes=0)


def _perceptron(request: _Request) -> Dataset:
    def make(generator: np.random.Generator, inputs: NDArray, direction: NDArray) -> Examples:
        sides = np.where(inputs @ direction >= 0, 1.0, -1.0)
        inputs = inputs + _MARGIN * sides[:, None] * direction
        return {"inputs": inputs.astype(np.float32), "targets": (sides > 0).astype(np.int32)}

    return _synthetic(request, make, classes=2)


def _synthetic(
    request: _Request, make: Callable[[Any, NDArray, NDArray], Examples], classes: int
) -> Dataset:
    """A problem of Gaussian inputs and one unit direction: `make` gives the examples from those."""

    def read(part: slice) -> Examples:
        generator = np.random.default_rng((request.seed, _SYNTHESIS))
        direction = generator.normal(size=_SYNTHETIC_FEATURES)
        direction /= np.linalg.norm(direction)
        shape = (_SYNTHETIC_TRAIN + _SYNTHETIC_TEST, _SYNTHETIC_FEATURES)
        examples = make(generator, generator.normal(size=shape), direction)
        return {key: values[part] for key, values in examples.items()}

    return Dataset(
        name=request.spec,
        train=lambda: read(slice(_SYNTHETIC_TRAIN)),
        test=lambda: read(slice(_SYNTHETIC_TRAIN, None)),
        train_examples=_SYNTHETIC_TRAIN,
        test_examples=_SYNTHETIC_TEST,
        input_shape=(_SYNTHETIC_FEATURES,),
        classes=classes,
    )


def _two_quadratics(request: _Request) -> Dataset:
    """Two unit vectors a_1, a_2 with cosine 1 - 1/(R + 1/2); example i costs (a_i . x)^2 / 2.

    From the unit vector along a_1 - a_2, `start`, no number of local steps nor a step size up to 1
    brings Local SGD on two workers below 1/(4e(R + 1/2)) in R rounds. It is tested on itself.

    Reference: Qin, Etesami, Uribe, "Faster Convergence of Local SGD for Over-Parameterized Models",
    TMLR 2024, https://arxiv.org/abs/2201.12719 (the instance is derived here)
    """
    text = "1000" if request.argument is None else request.argument
    if not text.isdecimal() or int(text) < 1:
        raise ConfigurationError(f"the rounds in {request.spec!r} must be a positive whole number")
    apart = 1 / (int(text) + 0.5)  # 1 - cosine
    along, across = np.sqrt(1 - apart / 2), np.sqrt(apart / 2)

    def read() -> Examples:
        return _float32(np.array([[along, across], [along, -across]]), np.zeros(2))

    start = np.array([0.0, 1.0], np.float32)
    return Dataset(request.spec, read, read, 2, 2, (2,), classes=0, start=start)


def _float32(inputs: NDArray, targets: NDArray) -> Examples:
    return {"inputs": inputs.astype(np.float32), "targets": targets.astype(np.float32)}


_SOURCES: Mapping[str, Callable[[_Request], Dataset]] = {
    "digits": _digits,
    "mnist": _mnist,
    "mnist_binary": _mnist_binary,
    "cifar10": _cifar10,
    "least_squares": _least_squares,
    "perceptron": _perceptron,
    "two_quadratics": _two_quadratics,
}
DATASETS = tuple(_SOURCES)
