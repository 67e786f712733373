"""The handwritten digits of scikit-learn, read from its file."""

import functools
import gzip
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data.dataset import Dataset, Request
from jaxlocal.data.examples import ArraySource
from jaxlocal.data.prepared import require

_FILE = "datasets/data/digits.csv.gz"  # 64 pixels from 0 to 16 and a label in each row


def digits(request: Request) -> Dataset:
    """1,797 images of 8 x 8, of which every fifth of each label is held out for the test."""
    require("digits", "scikit-learn", "sklearn")

    def read(held_out: bool) -> ArraySource:
        pixels, labels = np.split(_rows(), [64], axis=1)
        labels = labels[:, 0].astype(np.int32)
        # Every fifth example of each label, in order: stratified, and the same in every version.
        chosen = np.zeros(len(labels), bool)
        chosen[np.argsort(labels, kind="stable")[::5]] = True
        chosen = chosen == held_out
        images = np.rint(pixels[chosen] * (255 / 16)).astype(np.uint8)
        return ArraySource({"inputs": images.reshape(-1, 8, 8, 1), "targets": labels[chosen]})

    return Dataset(
        request.spec, lambda: read(False), lambda: read(True), 1437, 360, (8, 8, 1), classes=10
    )


@functools.cache
def _rows() -> NDArray[np.float64]:
    """The rows of the file, without an import of scikit-learn, which takes a second."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent / _FILE
    if not path.exists():  # in a version that keeps it elsewhere
        from sklearn.datasets import load_digits

        return np.column_stack(load_digits(return_X_y=True))
    with gzip.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",")
