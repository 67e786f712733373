"""EMNIST letters, read from the original files."""

from pathlib import Path

from jaxlocal.data.dataset import Dataset, Request
from jaxlocal.data.idx import IdxImages
from jaxlocal.data.prepared import given_folder
from jaxlocal.errors import ConfigurationError

_CLASSES = 62  # outputs of the model in the experiments of MLL-SGD; the labels are 1 to 26
_FOLDERS = ("", "emnist_letters", "emnist", "gzip")  # the last is that of the original archive
_SOURCE = "https://www.nist.gov/itl/products-and-services/emnist-dataset"


def emnist_letters(request: Request) -> Dataset:
    """EMNIST letters: 124,800 training and 20,800 test images of 28 x 28, with the labels 1 to 26.

    There are 62 classes, as the models of MLL-SGD's experiments have outputs. The files are
    `emnist-letters-train-images-idx3-ubyte.gz` and so on, gzipped or not, in the folder of datasets
    or in `emnist_letters`, `emnist` or `gzip` there. They hold the columns of an image as its rows.

    Reference: Cohen, Afshar, Tapson, van Schaik, "EMNIST: an extension of MNIST to handwritten
    letters", 2017, https://arxiv.org/abs/1702.05373
    """
    folder = given_folder(request.data_dir)
    if folder is None:
        raise ConfigurationError(
            f"emnist_letters is read from its original files ({_SOURCE}): point --data_dir or "
            "TFDS_DATA_DIR at their folder"
        )
    train, test = (
        IdxImages(
            request.spec,
            _file(folder, f"emnist-letters-{split}-images-idx3-ubyte"),
            _file(folder, f"emnist-letters-{split}-labels-idx1-ubyte"),
            _CLASSES,
            transposed=True,
        )
        for split in ("train", "test")
    )
    return Dataset(
        request.spec,
        lambda: train,
        lambda: test,
        len(train),
        len(test),
        train.shape,
        classes=_CLASSES,
    )


def _file(folder: str, name: str) -> Path:
    for within in _FOLDERS:
        for path in (Path(folder, within, f"{name}.gz"), Path(folder, within, name)):
            if path.is_file():
                return path
    raise ConfigurationError(
        f"emnist_letters needs the file {name}.gz, which is not in {folder}: it is in the archive "
        f"of original files at {_SOURCE}"
    )
