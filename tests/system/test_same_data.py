"""Processes of a run that read other data: they end before the first step."""

import jax
import numpy as np
import pytest
import tiny_images
from processes import joined

from experiments.building import same_data
from jaxlocal import ConfigurationError
from jaxlocal.data import load


@pytest.fixture
def folders(tmp_path):
    """Two folders with a dataset of the same sizes and images, and other labels."""
    pytest.importorskip("array_record")
    for name, label in (("0", None), ("1", 1)):
        tiny_images.write(tmp_path / name, label=label)
    return tmp_path


def test_a_digest_tells_data_apart(folders):
    first, second = (load("tiny_images", folders / name) for name in "01")
    assert same_data.fingerprint(first) == same_data.fingerprint(load("tiny_images", folders / "0"))
    assert same_data.fingerprint(first) != same_data.fingerprint(second)
    assert same_data.fingerprint(load("docstrings")) != same_data.fingerprint(load("docstrings:64"))


def test_a_dataset_of_floats_is_told_by_its_sizes():
    ours, seed = load("least_squares"), load("least_squares", seed=1)
    assert same_data.fingerprint(ours) == same_data.fingerprint(seed)


def test_all_processes_name_the_one_with_other_data(folders, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    first, second = (same_data.fingerprint(load("tiny_images", folders / name)) for name in "01")
    gathered = np.stack([np.frombuffer(digest, np.uint8) for digest in (first, first, second)])
    monkeypatch.setattr(same_data.multihost_utils, "process_allgather", lambda own: gathered)
    shown = f"{first.hex()[:8]} in process 0 and {second.hex()[:8]} in process 2"
    with pytest.raises(ConfigurationError, match=shown):
        same_data.check_same_data(load("tiny_images", folders / "1"))


@pytest.mark.slow
def test_two_processes_with_other_data_end_with_status_two(folders):
    flags = ["--dataset=tiny_images", f"--data_dir={folders}/NUMBER", "--model=logistic"]
    flags += ["--workers=2", "--batch_size=2", "--steps=8"]
    with joined(2, folders / "run", flags) as both:
        for one in both:
            _, error = one.communicate(timeout=120)
            assert one.returncode == 2
            assert error.startswith("error: the processes of a run need the same data: tiny_images")
            assert error.count("\n") == 1
