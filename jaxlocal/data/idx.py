"""Read idx files, the format in which MNIST and EMNIST are published, gzipped or not."""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data.checks import check_examples
from jaxlocal.data.examples import Examples
from jaxlocal.errors import ConfigurationError

_BYTES = 8  # the code of uint8 values; the last byte of the magic number is the number of axes


@dataclass(frozen=True)
class IdxImages:
    """Labelled images by number, of a file of images and a file of labels.

    Only the headers are read at first; the values are read at the first use, in each process.

    Args:
      name: of the dataset.
      images: path of a file uint8 [n, height, width].
      labels: path of a file uint8 [n].
      classes: number of classes.
      transposed: whether the file has the columns of an image as its rows.

    Raises:
      ConfigurationError: a file is missing, is not such a file or is damaged, or the files have
        different numbers of examples.
    """

    name: str
    images: Path
    labels: Path
    classes: int
    transposed: bool = False

    def __post_init__(self) -> None:
        (labels,), (images, *_) = read_shape(self.labels, 1), read_shape(self.images, 3)
        if images != labels:
            raise ConfigurationError(
                f"{self.images} says that it holds {images:,} images, and {self.labels} "
                f"{labels:,} labels"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        rows, columns = read_shape(self.images, 3)[1:]
        return (columns, rows, 1) if self.transposed else (rows, columns, 1)

    def __len__(self) -> int:
        return read_shape(self.labels, 1)[0]

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {key: values[number] for key, values in self._arrays.items()}

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [self[number] for number in numbers]

    def examples(self) -> Examples:
        """Read all examples: {"inputs": uint8 [n, height, width, 1], "targets": int32 [n]}."""
        return dict(self._arrays)

    def targets(self) -> NDArray[np.int32]:
        """Read all labels [n]."""
        labels = read(self.labels, 1).astype(np.int32)
        check_examples(self.name, {"targets": labels}, self.classes)
        return labels

    @cached_property
    def _arrays(self) -> Examples:
        images = read(self.images, 3)
        images = images.swapaxes(1, 2) if self.transposed else images
        return {"inputs": np.ascontiguousarray(images)[..., None], "targets": self.targets()}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_arrays"}


def read_shape(path: Path, axes: int) -> tuple[int, ...]:
    """Read the shape of an idx file of bytes from its header.

    Raises:
      ConfigurationError: it is missing or damaged, or is not an idx file of bytes with these axes.
    """
    return _parsed(path, axes, with_values=False)[0]


def read(path: Path, axes: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes.

    Raises:
      ConfigurationError: as `read_shape`; or it does not hold as many values as its header says.
    """
    shape, values = _parsed(path, axes, with_values=True)
    wanted = math.prod(shape)
    if len(values) != wanted:
        raise ConfigurationError(
            f"{path} is damaged: its header says {wanted:,} values, and it holds {len(values):,}"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _parsed(path: Path, axes: int, with_values: bool) -> tuple[tuple[int, ...], bytes]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            shape = _header(path, file, axes)
            return shape, file.read() if with_values else b""
    except (EOFError, OSError, zlib.error) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigurationError(f"{path} cannot be read: {cause}") from None


def _header(path: Path, file: Any, axes: int) -> tuple[int, ...]:
    header = file.read(4 + 4 * axes)
    wanted, found = bytes((0, 0, _BYTES, axes)), header[:4]
    if found != wanted:
        raise ConfigurationError(
            f"{path} is not an idx file of bytes with {axes} axes: its magic number is "
            f"0x{found.hex()}, not 0x{wanted.hex()}"
        )
    if len(header) < 4 + 4 * axes:
        raise ConfigurationError(f"{path} is damaged: it ends in its header")
    return struct.unpack(f">{axes}I", header[4:])
