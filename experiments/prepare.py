"""Prepare a set of labelled images of TensorFlow Datasets for experiments.train: download it and
write it in array_record files.

It needs a network and, for this alone, TensorFlow. What is prepared already is left as it is.
"""

import importlib.util
import sys

from absl import app, flags, logging
from absl.flags import FLAGS

from experiments.launching.command_line import FAILED, INTERRUPTED, fail
from jaxlocal import ConfigurationError
from jaxlocal.data import DATASETS, prepared

HELP = {
    "dataset": "The set, NAME or NAME/CONFIG, such as cifar100 or emnist/letters.",
    "data_dir": "Folder of prepared TensorFlow Datasets; else TFDS_DATA_DIR.",
}
SOURCES = {"mnist_binary": "mnist"}  # sets that are made of another
NEEDED = ("tensorflow", "importlib_resources")


def prepare(name: str, data_dir: str | None) -> str:
    """Prepare a set where it is not prepared, and say what is there.

    Raises:
      ConfigurationError: an unknown name, a set that is not one of images of one size with labels
        or that is damaged, or packages that are not installed.
    """
    name = SOURCES.get(name, name)
    prepared.require(name, "tensorflow-datasets", "tensorflow_datasets")
    folder = prepared.root(data_dir)
    ready = prepared.located(name, folder) is not None
    if not ready:
        _download(name, folder)
    found = prepared.find(name, folder)
    return (
        f"{name} is {'already ' * ready}prepared in {folder}: {len(found.train):,} training and "
        f"{len(found.test):,} test images of {list(found.input_shape)}, {found.classes} classes"
    )


def run(name: str | None, data_dir: str | None) -> int:
    """Prepare a set; the exit status."""
    status = FAILED
    try:
        if not name:
            raise ConfigurationError("--dataset=NAME says what to prepare")
        print(prepare(name, data_dir))
        return 0
    except ConfigurationError as error:
        fail(str(error))
    except KeyboardInterrupt:
        cause, status = "interrupted", INTERRUPTED
    except Exception as error:  # the network's, the disk's, TensorFlow's; each of its own kind
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    # What is half written lies in a folder of another name, and is removed there.
    print(f"error: {name} could not be prepared: {cause}", file=sys.stderr)
    return status


def _download(name: str, folder: str) -> None:
    import tensorflow_datasets as tfds

    if name in DATASETS and name not in tfds.list_builders(with_community_datasets=False):
        raise ConfigurationError(f"dataset {name!r} is not read from files: nothing to prepare")
    prepared.check_known(name, DATASETS)
    missing = [module for module in NEEDED if not importlib.util.find_spec(module)]
    if missing:
        raise _missing(name, " ".join(missing))
    try:
        builder = tfds.builder(name, data_dir=folder)
        prepared.image_and_label(name, builder.info.features)  # rather now than after hours
        # What lies prepared on its servers is in another format.
        elsewhere = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(file_format="array_record", download_config=elsewhere)
    except ImportError as error:
        raise _missing(name, error.name or str(error)) from error


def _missing(name: str, packages: str) -> ConfigurationError:
    return ConfigurationError(
        f"to prepare {name} needs {packages}, not installed here: pip install {packages}"
    )


def _parse(argv: list[str]) -> list[str]:
    if {"-h", "--help", "-help", "--helpfull", "--helpshort"} & set(argv[1:]):
        print(__doc__, *(f"  --{name}: {text}" for name, text in HELP.items()), sep="\n")
        sys.exit(0)
    try:
        rest = FLAGS(argv)
    except flags.Error as error:
        fail(str(error))
    if rest[1:]:
        fail(f"what is {rest[1]!r}? flags look like --name=value")
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # what libraries say of themselves is noise here
    return rest


def main() -> None:
    for name, text in HELP.items():
        flags.DEFINE_string(name, None, text)
    app.run(lambda _: run(FLAGS.dataset, FLAGS.data_dir), flags_parser=_parse)


if __name__ == "__main__":
    main()
