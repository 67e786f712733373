"""Several processes train on the same data: each reads its own copy, and --data_dir may differ."""

import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlocal import ConfigurationError
from jaxlocal.data import Dataset

SAMPLE = 64  # examples of each split that are compared


def check_same_data(dataset: Dataset) -> None:
    """Check that all processes have the same dataset: its sizes, and a sample of its examples.

    Raises:
      ConfigurationError: they have not, in every process.
    """
    if jax.process_count() == 1:
        return
    own = np.frombuffer(fingerprint(dataset), np.uint8)
    everyone = multihost_utils.process_allgather(own)
    differs = (everyone != everyone[0]).any(axis=1)
    if differs.any():
        number = int(differs.argmax())
        shown = [everyone[n].tobytes().hex()[:8] for n in (0, number)]
        raise ConfigurationError(
            f"the processes of a run need the same data: {dataset.name} has the digest {shown[0]} "
            f"in process 0 and {shown[1]} in process {number}; give all the same --data_dir"
        )


def fingerprint(dataset: Dataset) -> bytes:
    """A digest of the sizes of a dataset, and of examples at even distances.

    Floats are left out: they are computed from the seed, and rounded as the machine does.
    """
    sizes = (dataset.train_examples, dataset.test_examples, dataset.input_shape, dataset.classes)
    found = hashlib.sha256(repr(sizes).encode())
    for source in (dataset.train_source(), dataset.test_source()):
        for number in np.linspace(0, len(source) - 1, min(SAMPLE, len(source)), dtype=int):
            values = {name: np.asarray(value) for name, value in source[int(number)].items()}
            for name, value in sorted(values.items()):
                if not np.issubdtype(value.dtype, np.floating):
                    found.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return found.digest()
