"""Checks that the data of a run are distributed, augmented and read as the flags say."""

from experiments.building.config import Config
from jaxlocal import ConfigurationError
from jaxlocal.data import Augmentation, Dataset, parse_partition


def check_data(config: Config, dataset: Dataset, augmentation: Augmentation | None) -> None:
    """Check that partition and augmentation fit the dataset, and what only a stream can do.

    Raises:
      ConfigurationError: they do not, or `--stream` is missing.
    """
    if parse_partition(config.partition).kind == "by_distance" and dataset.normal is None:
        raise ConfigurationError(
            f"--partition={config.partition} is for datasets that define a separating hyperplane, "
            f"such as perceptron; {config.dataset} defines none"
        )
    if dataset.varying and not config.stream:
        raise ConfigurationError(
            f"the images of {config.dataset} vary in size, so that it needs --stream, which "
            "resizes them while they are read"
        )
    if augmentation is not None:
        _check_augmentation(config, dataset, augmentation)


def _check_augmentation(config: Config, dataset: Dataset, augmentation: Augmentation) -> None:
    if len(dataset.input_shape) != 3:
        raise ConfigurationError(
            f"--augment={config.augment} is for images; the examples of {config.dataset} have "
            f"shape {dataset.input_shape}"
        )
    augmentation.check(dataset.input_shape)
    if augmentation.only_on_host and not config.stream:
        raise ConfigurationError(
            f"--augment={config.augment} needs --stream: RandAugment is computed where images are "
            "read"
        )
