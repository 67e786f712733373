"""Read labelled images from files that TensorFlow Datasets prepared, without TensorFlow.

Nothing here uses the network. Files are opened at the first read, in each process that reads.
"""

import difflib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data.descriptions import (
    check_described,
    count_examples,
    evaluation_split,
    image_and_label,
)
from jaxlocal.errors import ConfigurationError, unknown

_AT_ONCE = 4096  # records in memory while labels are read

Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class PreparedSplit:
    """The examples of one split by number: {"inputs": image, "targets": int32 label}.

    Where images vary in size, the inputs are the bytes of encoded images.
    """

    name: str
    folder: str
    split: str
    length: int
    image: str  # name of the feature with the image
    label: str  # name of the feature with the label
    shape: tuple[Any, ...]  # of an image; None for a side that varies
    labels: int  # how many labels there are
    classes: tuple[int, ...] = ()  # the class of each label; () where they are equal

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        found = [range(self.length)[number] for number in numbers]
        with in_one_sentence(self.name, self.folder):
            return [
                {"inputs": self._input(example), "targets": self._target(example)}
                for example in self._images.__getitems__(found)
            ]

    def examples(self) -> dict[str, NDArray[Any]]:
        """Read all examples: {"inputs": [n, *shape], "targets": int32 [n]}."""
        examples = self.__getitems__(range(self.length))
        return {key: np.stack([example[key] for example in examples]) for key in examples[0]}

    def targets(self) -> NDArray[np.int32]:
        """Read all labels [n], without decoding an image."""
        out = np.empty(self.length, np.int32)
        with in_one_sentence(self.name, self.folder):
            source = self._open({self.image})
            for start in range(0, self.length, _AT_ONCE):
                records = source.__getitems__(range(start, min(start + _AT_ONCE, self.length)))
                out[start : start + len(records)] = [self._target(record) for record in records]
        return out

    @cached_property
    def _images(self) -> Any:
        return self._open({self.image} if None in self.shape else set())

    def _open(self, skipped: set[str]) -> Any:
        import tensorflow_datasets as tfds

        check_described(self.folder)
        builder = tfds.builder_from_directory(self.folder)
        features = builder.info.features
        # Other images, such as masks, take as long to decode as the image itself.
        others = {key for key, kind in features.items() if isinstance(kind, tfds.features.Image)}
        skipped = skipped | (others - {self.image})
        decoders = {key: tfds.decode.SkipDecoding() for key in skipped}
        return builder.as_data_source(split=self.split, decoders=decoders)

    def _input(self, example: dict[str, Any]) -> Any:
        if None in self.shape:
            return example[self.image]
        image: NDArray[np.uint8] = np.asarray(example[self.image])
        if image.shape != self.shape or image.dtype != np.uint8:
            raise ConfigurationError(
                f"an image in the split {self.split!r} of {self.name} is {image.dtype}"
                f"{list(image.shape)}, and its features.json says uint8{list(self.shape)}: prepare "
                "it again"
            )
        return image

    def _target(self, example: dict[str, Any]) -> np.int32:
        label = int(example[self.label])
        if label < 0:
            raise ConfigurationError(
                f"examples in the split {self.split!r} of {self.name} have no label: {self.label} "
                f"is {label}"
            )
        if label >= self.labels:
            raise ConfigurationError(
                f"the split {self.split!r} of {self.name} has the label {label}, and it has "
                f"{self.labels} classes: prepare it again"
            )
        return np.int32(self.classes[label] if self.classes else label)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_images"}


class Prepared(NamedTuple):
    """A prepared dataset of labelled images."""

    train: PreparedSplit
    test: PreparedSplit
    input_shape: tuple[Any, ...]  # (height, width, channels); None for a side that varies
    classes: int  # number of classes


def find(name: str, data_dir: Folder | None, own: Iterable[str] = ()) -> Prepared:
    """Find a prepared dataset by its name.

    Args:
      name: NAME or NAME/CONFIG.
      data_dir: the folder of prepared datasets, see `root`.
      own: names of datasets to suggest in addition to those of TensorFlow Datasets.

    Returns:
      The dataset; no example is read.

    Raises:
      ConfigurationError: the name is unknown, or the dataset is not prepared, is damaged, is
        prepared in a format that needs TensorFlow, or does not hold labelled images.
    """
    folder = root(data_dir)
    builder = located(name, folder)
    if builder is None:
        check_known(name, own)
        raise ConfigurationError(f"{name} is not prepared in {folder}: {_how_to_prepare(name)}")
    place = str(builder.data_path)
    with in_one_sentence(name, place):
        features = builder.info.features
        image, label = image_and_label(name, features)
        shape, classes = tuple(features[image].shape), features[label].num_classes
        splits, kind = builder.info.splits, builder.info.file_format.value
        train, test = (
            PreparedSplit(
                name=name,
                folder=place,
                split=split,
                length=count_examples(splits[split], place, kind),
                image=image,
                label=label,
                shape=shape,
                labels=classes,
            )
            for split in ("train", evaluation_split(name, splits))
        )
        return Prepared(train, test, shape, classes)


def root(data_dir: Folder | None) -> str:
    """The folder of prepared datasets.

    It is `data_dir` if given, else the environment variable TFDS_DATA_DIR if set, else the default
    of TensorFlow Datasets.
    """
    from tensorflow_datasets.core import constants

    return given_folder(data_dir) or os.path.expanduser(constants.DATA_DIR)


def given_folder(data_dir: Folder | None) -> str | None:
    """The folder of datasets that is given, or that of the environment variable TFDS_DATA_DIR."""
    if data_dir is not None and not isinstance(data_dir, str | os.PathLike):
        raise ConfigurationError(f"data_dir must be a path, got {type(data_dir).__name__}")
    if "\0" in os.fspath(data_dir or ""):
        raise ConfigurationError("data_dir holds the character NUL, which no path does")
    # TensorFlow Datasets reads the variable only once, at its first import.
    folder = data_dir or os.environ.get("TFDS_DATA_DIR")
    return os.path.expanduser(folder) if folder else None


def located(name: str, folder: str) -> Any:
    """The builder of a dataset in a folder of prepared datasets; None if it is not there.

    Args:
      name: NAME or NAME/CONFIG.
      folder: the folder of prepared datasets.

    Raises:
      ConfigurationError: the dataset is damaged, or in a format that needs TensorFlow.
    """
    from tensorflow_datasets.core import naming, read_only_builder, registered

    if ":" in name or not naming.is_valid_dataset_name(name):
        return None
    with in_one_sentence(name, folder):
        check_described(Path(folder, name.partition("/")[0]))
        try:
            builder = read_only_builder.builder_from_files(name, data_dir=folder)
        except registered.DatasetNotFoundError:
            return None
        kind = builder.info.file_format.value
    if kind not in ("array_record", "parquet"):
        raise ConfigurationError(
            f"{name} in {builder.data_path} is prepared as {kind}, which cannot be read without "
            f"TensorFlow; for another folder, {_how_to_prepare(name)}"
        )
    return builder


def check_known(name: str, own: Iterable[str] = ()) -> None:
    """Raise an error if TensorFlow Datasets has no dataset with this name and configuration.

    Args:
      name: NAME or NAME/CONFIG.
      own: names of datasets to suggest in addition to those of TensorFlow Datasets.

    Raises:
      ConfigurationError: the name or the configuration is unknown.
    """
    import tensorflow_datasets as tfds

    base, slash, config = name.partition("/")
    names = tfds.list_builders(with_community_datasets=False)
    if base not in names:
        known = dict.fromkeys([*own, *difflib.get_close_matches(base, names)])
        raise ConfigurationError(
            f"{unknown('dataset', base, known)}, and the other datasets of TensorFlow Datasets"
        )
    try:
        configs = tfds.builder_cls(base).builder_configs
    except ImportError:  # of a package that only the preparation needs
        return
    if slash and config not in configs:
        if configs:
            raise unknown(f"configuration of {base}", config, configs)
        raise ConfigurationError(f"dataset {base!r} has no configurations, got {name!r}")


def require(dataset: str, package: str, *modules: str) -> None:
    """Raise an error that names the package to install if none of these modules is installed."""
    if not any(importlib.util.find_spec(module) for module in modules):
        raise ConfigurationError(
            f"dataset {dataset!r} needs {package}, which is not installed: "
            "pip install 'jaxlocal[experiments]'"
        )


@contextmanager
def in_one_sentence(name: str, folder: str) -> Iterator[None]:
    """Turn every error into a ConfigurationError of one sentence."""
    try:
        yield
    except ConfigurationError:
        raise
    except ImportError as error:
        needs = f"needs {error.name}, which is not installed" if error.name else f"needs: {error}"
        raise ConfigurationError(f"dataset {name!r} {needs}") from error
    except Exception as error:  # array_record, protobuf and Pillow raise their own classes
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigurationError(
            f"the files of {name} in {folder} are damaged ({cause}): delete them and prepare them "
            "again, or point --data_dir at a folder with intact files"
        ) from error


def _how_to_prepare(name: str) -> str:
    return (
        "on a machine with a network run "
        f"`python -m experiments.prepare --dataset={name} --data_dir=FOLDER`, then point "
        "--data_dir or TFDS_DATA_DIR at FOLDER"
    )
