"""Datasets: real ones and synthetic problems. Their sizes are known before any example is read.

| name | dataset |
|---|---|
| `digits` | scikit-learn's 8x8 digits, which need no download |
| `docstrings`, `docstrings:LENGTH` | Python's docstrings, in sequences of LENGTH characters |
| `mnist`, `cifar10` | MNIST and CIFAR-10 as TensorFlow Datasets prepared them |
| `NAME`, `NAME/CONFIG` | another dataset of TensorFlow Datasets, of labelled images |
| `emnist_letters` | EMNIST letters with 62 classes, from the original files |
| `mnist_binary` | MNIST with class 1 for the digits 0 to 4 and class 0 for 5 to 9 |
| `least_squares` | Gaussian inputs, and a linear target with noise |
| `perceptron[:squared_hinge[:MARGIN]]` | two linearly separable classes, with that loss |
| `two_quadratics`, `two_quadratics:R` | two examples on which Local SGD needs more than R rounds |
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import replace

from jaxlocal.data.checks import check_name, check_whole
from jaxlocal.data.dataset import Dataset, Request
from jaxlocal.data.digits import digits
from jaxlocal.data.emnist import emnist_letters
from jaxlocal.data.examples import ArraySource
from jaxlocal.data.prepared import PreparedSplit, find, require
from jaxlocal.data.synthetic import least_squares, perceptron, two_quadratics
from jaxlocal.data.varying import ResizedImages
from jaxlocal.errors import ConfigurationError, unknown

# Mean and standard deviation of each channel over the training pixels, as fractions of 255.
_PIXELS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_IMAGE_SIZE, _LARGEST_IMAGE = 224, 4096  # pixels


def load(
    spec: str,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    image_size: int | None = None,
) -> Dataset:
    """Load a dataset by its name. Only its sizes are read; `train` and `test` read the examples.

    Args:
      spec: one of `DATASETS`, with an argument for some of them, see
        `jaxlocal.data.sources`; or NAME or NAME/CONFIG of another dataset of TensorFlow Datasets.
        Of the latter, the test set is the split test, else validation, and the label is the
        feature "label", else the only label.
      data_dir: folder of datasets that TensorFlow Datasets prepared; by default the environment
        variable TFDS_DATA_DIR, else the default of TensorFlow Datasets.
      seed: seed of a synthetic problem, not negative. Real datasets and their splits do not depend
        on it.
      image_size: height and width in pixels to which images of varying size are resized; by default
        224. The sources of such a dataset give the middle square of each image, and
        `train_source().streamed(augmentation)` what a stream trains on.

    Returns:
      The dataset.

    Raises:
      ConfigurationError: the name is unknown, the dataset is not prepared or does not hold labelled
        images, an image size is given for images of one size, or a package is not installed.
        Reading damaged files raises it too.

    >>> data = load("least_squares", seed=1)
    >>> data.train_examples, data.input_shape, data.train()["targets"].shape
    (4096, (32,), (4096,))
    """
    check_name("a dataset", spec)
    check_whole(0, seed=seed)
    if image_size is not None:
        check_whole(1, image_size=image_size)
        if image_size > _LARGEST_IMAGE:
            raise ConfigurationError(
                f"image_size must be at most {_LARGEST_IMAGE} pixels, got {image_size}"
            )
    name, colon, argument = spec.partition(":")
    request = Request(spec, argument if colon else None, data_dir, seed, image_size)
    if colon and name in _SOURCES and name not in _WITH_ARGUMENT:
        raise ConfigurationError(f"dataset {name!r} takes no argument, got {spec!r}")
    if name not in _SOURCES and not importlib.util.find_spec("tensorflow_datasets"):
        raise ConfigurationError(
            f"{unknown('dataset', spec, DATASETS)}, and those of tensorflow-datasets, which is "
            "not installed"
        )
    data = _SOURCES.get(name, _prepared)(request)
    if image_size is not None and not data.varying:
        raise ConfigurationError(
            f"an image size, here {image_size}, is for images of varying size, and the examples of "
            f"{spec} have the shape {list(data.input_shape)}"
        )
    return data


def _mnist_binary(request: Request) -> Dataset:
    classes = tuple(int(digit <= 4) for digit in range(10))
    data = _prepared(request._replace(spec="mnist"), classes)
    return data._replace(name=request.spec, classes=2)


def _prepared(request: Request, classes: tuple[int, ...] = ()) -> Dataset:
    """A dataset of TensorFlow Datasets; `classes`, if any, are the classes of its labels."""
    name = request.spec
    require(name, "tensorflow-datasets", "tensorflow_datasets")
    require(name, "array_record", "array_record")
    require(name, "Pillow", "PIL", "cv2")
    found = find(name, request.data_dir, DATASETS)
    train, test = replace(found.train, classes=classes), replace(found.test, classes=classes)
    mean, scale = _PIXELS.get(name, ((0.0,), (1.0,)))
    data = Dataset(
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
    return _resized(data, train, test, request.image_size) if None in train.shape else data


def _resized(
    data: Dataset, train: PreparedSplit, test: PreparedSplit, image_size: int | None
) -> Dataset:
    """A dataset of images of varying size, as one of squares."""
    size = image_size or _IMAGE_SIZE
    train_source, test_source = ResizedImages(train, size), ResizedImages(test, size)
    return data._replace(
        train_source=lambda: train_source,
        test_source=lambda: test_source,
        input_shape=(size, size, data.input_shape[-1]),
        varying=True,
    )


def _docstrings(request: Request) -> Dataset:
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


_SOURCES: Mapping[str, Callable[[Request], Dataset]] = {
    "digits": digits,
    "docstrings": _docstrings,
    "mnist": _prepared,
    "mnist_binary": _mnist_binary,
    "cifar10": _prepared,
    "emnist_letters": emnist_letters,
    "least_squares": least_squares,
    "perceptron": perceptron,
    "two_quadratics": two_quadratics,
}
DATASETS = tuple(_SOURCES)
_WITH_ARGUMENT = ("docstrings", "perceptron", "two_quadratics")
