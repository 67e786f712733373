"""Read and check the files that describe a prepared dataset.

TensorFlow Datasets imports the classes that `features.json` names, and believes the numbers of
examples in `dataset_info.json`, so both are checked first.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxlocal.errors import ConfigurationError

MOST_CLASSES = 1_000_000
_LARGEST = 64 << 20  # bytes of a file of descriptions
_IMPORTED_FROM = "tensorflow_datasets."
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")


def check_described(folder: str | os.PathLike[str]) -> None:
    """Check all descriptions in the folder of a dataset: of all versions and configurations.

    Nothing is imported, whatever the files name.

    Raises:
      ConfigurationError: a file is too large, is not JSON, or names a class of a feature outside
        TensorFlow Datasets.
    """
    for pattern in ("", "*/", "*/*/"):
        for file in Path(folder).glob(f"{pattern}features.json"):
            for name in _classes(_read(file)):
                if not name.startswith(_IMPORTED_FROM):
                    raise ConfigurationError(
                        f"{file} names the class {name[:80]!r} of a feature, which is not of "
                        "TensorFlow Datasets: it is not imported"
                    )
        for file in Path(folder).glob(f"{pattern}dataset_info.json"):
            _read(file)


def check_sizes(name: str, shape: tuple[int | None, ...], classes: int | None) -> None:
    """Check the shape of the images and the number of classes of a dataset.

    Height and width may be None: images of varying size. These have 1 or 3 channels.

    Raises:
      ConfigurationError: a size is not positive, the number of channels is not known or is not 1 or
        3 where sizes vary, or there are not 2 to a million classes.

    >>> check_sizes("mnist", (28, 28, 1), 10)
    >>> check_sizes("imagenet2012", (None, None, 3), 1000)
    """
    known = len(shape) == 3 and all(side is None or side > 0 for side in shape)
    if not known or shape[-1] not in ((1, 3) if None in shape else shape[-1:]):
        raise ConfigurationError(
            f"the images of dataset {name!r} must be [height, width, channels], with 1 or 3 "
            f"channels where their size varies, and their shape is {shape}"
        )
    if classes is None or not 2 <= classes <= MOST_CLASSES:
        raise ConfigurationError(
            f"the labels of dataset {name!r} must have 2 to {MOST_CLASSES:,} classes, and "
            f"features.json says {classes}"
        )


def image_and_label(name: str, features: Any) -> tuple[str, str]:
    """Names of the feature with the image and of the feature with its label.

    Raises:
      ConfigurationError: there is no image or no label, there are several and none has the usual
        name, or the images are not uint8.
    """
    import tensorflow_datasets as tfds

    def one_of(kind: type, usual: str) -> str:
        # The types must be equal, since features such as masks are subclasses of Image.
        found = [key for key, feature in features.items() if type(feature) is kind]
        if usual not in found and len(found) != 1:
            raise ConfigurationError(
                f"dataset {name!r} does not hold images with labels: its features are "
                f"{', '.join(sorted(features))}, and none is clearly the {usual}"
            )
        return usual if usual in found else found[0]

    image = one_of(tfds.features.Image, "image")
    label = one_of(tfds.features.ClassLabel, "label")
    check_sizes(name, features[image].shape, features[label].num_classes)
    dtype = features[image].np_dtype
    if dtype != np.uint8:
        raise ConfigurationError(f"the images of dataset {name!r} are {dtype}, not uint8")
    return image, label


def evaluation_split(name: str, splits: Iterable[str]) -> str:
    """The held-out split: test if there is one, else validation.

    Raises:
      ConfigurationError: there is no split train, or no held-out split.
    """
    splits = set(splits)
    for split in ("test", "validation"):
        if {"train", split} <= splits:
            return split
    raise ConfigurationError(
        f"dataset {name!r} needs the splits train and test or validation, and has "
        f"{', '.join(sorted(splits)) or 'none'}"
    )


def count_examples(split: Any, folder: str, kind: str) -> int:
    """Number of examples of a split, which its description and its files must agree on.

    Args:
      split: of TensorFlow Datasets.
      folder: of the files of the dataset.
      kind: the format of its files.

    Raises:
      ConfigurationError: the files hold another number than `dataset_info.json` says.
    """
    for path, said in zip(split.filepaths, split.shard_lengths, strict=True):
        if not Path(path).exists():
            raise FileNotFoundError(f"{path.name} is missing")
        if Path(path).parent != Path(folder):
            raise ConfigurationError(f"dataset_info.json names {path}, which is not in {folder}")
        held = _records(path) if kind == "array_record" else said
        if said != held or said < 0:
            raise ConfigurationError(
                f"{path} holds {held:,} examples, and the dataset_info.json beside it says "
                f"{said:,}: prepare the dataset again"
            )
    return int(split.num_examples)


def _records(path: Any) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(os.fspath(path))
    try:
        return int(reader.num_records())
    finally:
        reader.close()


def _read(file: Path) -> Any:
    size = file.stat().st_size
    if size > _LARGEST:
        raise ConfigurationError(
            f"{file} has {size:,} bytes, and a description has {_LARGEST:,} at most"
        )
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        cause = " ".join(str(error).split())[:120]
        raise ConfigurationError(
            f"{file} is damaged ({cause}): prepare the dataset again"
        ) from None


def _classes(described: Any) -> Iterator[str]:
    """The names of classes anywhere in a description, and in JSON that its strings hold."""
    if isinstance(described, list):
        for part in described:
            yield from _classes(part)
    elif isinstance(described, dict):
        for key, part in described.items():
            if key in _CLASS_KEYS and isinstance(part, str):
                yield part
            yield from _classes(part)
    elif isinstance(described, str) and described.lstrip()[:1] in ("{", "["):
        try:
            yield from _classes(json.loads(described))
        except ValueError:  # a text that only looks like it
            return
