"""Prepare an image dataset of TensorFlow Datasets for experiments.train: download it and write it
in array_record files.

It needs a network and, unlike the other commands, TensorFlow. A dataset that is prepared already is
left unchanged.
"""

from absl import flags
from absl.flags import FLAGS

from experiments.building.files import local_path
from experiments.launching.command_line import run_command
from experiments.preparing.download import prepare
from jaxlocal import ConfigurationError


def main() -> int:
    """Prepare the dataset of the flags; returns the exit status."""
    if not FLAGS.dataset:
        raise ConfigurationError("give --dataset=NAME, the dataset to prepare")
    chosen = FLAGS.data_dir
    folder = None if chosen is None else str(local_path("--data_dir", chosen))
    print(prepare(FLAGS.dataset, folder))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("dataset", None, "NAME or NAME/CONFIG, such as cifar100 or emnist/letters.")
    flags.DEFINE_string(
        "data_dir", None, "Folder of prepared TensorFlow Datasets. By default TFDS_DATA_DIR."
    )
    run_command(main, __doc__)
