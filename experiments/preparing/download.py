"""Download an image dataset of TensorFlow Datasets, and write it in array_record files."""

import importlib.util

from experiments.launching.statuses import Failure
from experiments.launching.stopping import raising
from jaxlocal import ConfigurationError
from jaxlocal.data import DATASETS, descriptions, prepared

SOURCES = {"mnist_binary": "mnist"}  # datasets that are made of another one
NEEDED = ("tensorflow", "importlib_resources")


def prepare(name: str, data_dir: str | None) -> str:
    """Prepare a dataset unless it is prepared already; returns a sentence about it.

    Raises:
      ConfigurationError: an unknown name, a dataset that is not one of labelled images or that is
        damaged, or packages that are not installed.
      Failure: the download failed.
    """
    name = SOURCES.get(name, name)
    prepared.require(name, "tensorflow-datasets", "tensorflow_datasets")
    folder = prepared.root(data_dir)
    ready = prepared.located(name, folder) is not None
    if not ready:
        _download(name, folder)
    found = prepared.find(name, folder)
    sides = found.input_shape
    shape = "varying size" if None in sides else list(sides)
    return (
        f"{name} is {'already ' * ready}prepared in {folder}: {len(found.train):,} training and "
        f"{len(found.test):,} test images of {shape}, {found.classes} classes"
    )


def _download(name: str, folder: str) -> None:
    import tensorflow_datasets as tfds

    if name in DATASETS and name not in tfds.list_builders(with_community_datasets=False):
        raise ConfigurationError(
            f"dataset {name!r} is not one of TensorFlow Datasets: there is nothing to prepare"
        )
    prepared.check_known(name, DATASETS)
    missing = [module for module in NEEDED if not importlib.util.find_spec(module)]
    if missing:
        raise _missing(name, " ".join(missing))
    try:
        builder = tfds.builder(name, data_dir=folder)
        descriptions.image_and_label(name, builder.info.features)  # before hours of downloading
        # The prepared files on the servers of TensorFlow Datasets have another format.
        elsewhere = tfds.download.DownloadConfig(try_download_gcs=False)
        with raising():  # TensorFlow Datasets removes what is incomplete
            builder.download_and_prepare(file_format="array_record", download_config=elsewhere)
    except ConfigurationError:
        raise
    except KeyboardInterrupt as error:
        error.args = (f"{name} could not be prepared: {str(error) or 'interrupted'}",)
        raise
    except ImportError as error:
        raise _missing(name, error.name or str(error)) from error
    except Exception as error:  # the kinds depend on the network, the disk and TensorFlow
        # Incomplete files lie in a folder of another name, which TensorFlow Datasets removes.
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise Failure(f"{name} could not be prepared: {cause}") from error


def _missing(name: str, packages: str) -> ConfigurationError:
    return ConfigurationError(
        f"to prepare {name} needs {packages}, not installed here: pip install {packages}"
    )
