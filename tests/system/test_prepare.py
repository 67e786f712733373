"""Preparing datasets: what is downloaded, and what is reported to the user."""

from pathlib import Path

import pytest
import tiny_images
from binaries import call

from experiments.launching.statuses import explained
from experiments.preparing import download
from experiments.preparing.download import prepare
from jaxlocal.data import load
from jaxlocal.errors import ConfigurationError

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture
def packages(monkeypatch):
    """All packages that preparing needs count as installed."""
    monkeypatch.setattr(download, "NEEDED", ())


def downloads(monkeypatch, effect):
    """Replace the download by `effect(builder)`; returns the list of the options it was given."""
    calls = []

    def download_and_prepare(builder, **options):
        calls.append(options)
        effect(builder)

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare)
    return calls


def write_kmnist(builder):
    kinds = tiny_images.features(image=tfds.features.Image(shape=(28, 28, 1)))
    folder = tiny_images.write(Path(builder.data_path).parents[1], "kmnist", kinds)
    folder.rename(builder.data_path)


def test_a_dataset_is_prepared_once_in_array_records(tmp_path, packages, monkeypatch):
    calls = downloads(monkeypatch, write_kmnist)
    sentence = prepare("kmnist", str(tmp_path))
    assert f"kmnist is prepared in {tmp_path}: 12 training and 7 test images" in sentence
    [options] = calls
    assert options["file_format"] == "array_record"
    assert not options["download_config"].try_download_gcs
    assert load("kmnist", tmp_path).targets().tolist() == [n % 3 for n in range(12)]
    assert f"kmnist is already prepared in {tmp_path}" in prepare("kmnist", str(tmp_path))
    assert len(calls) == 1


def test_a_dataset_that_cannot_be_trained_on_is_refused_before_the_download(
    tmp_path, packages, monkeypatch
):
    calls = downloads(monkeypatch, lambda builder: None)
    for name, reason in {
        "ag_news_subset": "none is clearly the image",
        "digits": "'digits' is not one of TensorFlow Datasets",
        "emnist_letters": "'emnist_letters' is not one of TensorFlow Datasets",
        "cifar": "did you mean 'cifar10' or 'cifar100'",
        "emnist/lettrs": "did you mean 'letters'",
    }.items():
        with pytest.raises(ConfigurationError, match=reason):
            prepare(name, str(tmp_path))
    assert not calls and not list(tmp_path.iterdir())


def test_a_dataset_made_of_another_is_prepared_as_that_other(tmp_path):
    tiny_images.write(tmp_path, "mnist")
    assert prepare("mnist_binary", str(tmp_path)).startswith("mnist is already prepared")


@pytest.mark.parametrize(
    "error, status, reason",
    [
        (ConnectionError("no route\nto host"), 1, "ConnectionError: no route to host"),
        (AssertionError("put the files there yourself"), 1, "put the files there yourself"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ModuleNotFoundError("no scipy", name="scipy"), 2, "needs scipy, not installed here"),
    ],
)
def test_a_failure_is_one_sentence_and_a_status(
    error, status, reason, tmp_path, packages, monkeypatch
):
    def fail(builder):
        raise error

    downloads(monkeypatch, fail)
    with pytest.raises(BaseException) as raised:
        prepare("kmnist", str(tmp_path))
    sentence, ended = explained(raised.value)
    assert ended == status and "\n" not in sentence
    assert reason in sentence and "kmnist" in sentence
    with pytest.raises(ConfigurationError, match="is not prepared"):
        load("kmnist", tmp_path)


def test_an_interrupted_preparation_leaves_nothing_that_looks_prepared(tmp_path, monkeypatch):
    # TensorFlow Datasets itself writes all files in a folder of another name.
    from tensorflow_datasets.core.utils import file_utils

    place = tmp_path / "kmnist" / "3.0.1"
    with pytest.raises(KeyboardInterrupt), file_utils.incomplete_dir(place) as folder:
        written = tiny_images.write(tmp_path / "elsewhere", "kmnist")
        for file in written.iterdir():
            file.rename(Path(folder) / file.name)
        with pytest.raises(ConfigurationError, match="is not prepared"):
            load("kmnist", tmp_path)
        raise KeyboardInterrupt
    assert not list(place.parent.iterdir())


def test_missing_packages_are_named_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "NEEDED", ("tensorflow_that_is_missing",))
    calls = downloads(monkeypatch, lambda builder: None)
    with pytest.raises(ConfigurationError, match="pip install tensorflow_that_is_missing"):
        prepare("kmnist", str(tmp_path))
    assert not calls and not list(tmp_path.iterdir())


def test_a_missing_name_is_a_mistake():
    done = call("prepare")
    assert done.status == 2
    assert done.error == "error: give --dataset=NAME, the dataset to prepare\n"


def test_another_format_of_files_is_refused(tmp_path):
    info = tiny_images.write(tmp_path) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ConfigurationError, match="is prepared as tfrecord"):
        prepare("tiny_images", str(tmp_path))


def test_the_command_line(tmp_path):
    tiny_images.write(tmp_path)
    done = call("prepare", "--dataset=tiny_images", f"--data_dir={tmp_path}")
    assert (done.status, done.error) == (0, "")
    assert "already prepared" in done.out
    done = call("prepare", "--datset=tiny_images", f"--data_dir={tmp_path}")
    assert done.status == 2 and not done.out
    assert done.error == "error: Unknown command line flag 'datset'. Did you mean: dataset ?\n"
