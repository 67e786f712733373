"""Datasets of TensorFlow Datasets by their names: reading them, and the errors."""

import io
import pickle
import socket

import numpy as np
import pytest
import tiny_images

from jaxlocal.data import load, make_batches, prepared
from jaxlocal.errors import ConfigurationError

tfds = pytest.importorskip("tensorflow_datasets")


def error_of(name, data_dir) -> str:
    """The one sentence of the error."""
    with pytest.raises(ConfigurationError) as caught:
        load(name, data_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def data(tmp_path):
    tiny_images.write(tmp_path)
    return load("tiny_images", tmp_path)


def test_a_dataset_is_read_by_its_name(data):
    assert (data.train_examples, data.test_examples) == (12, 7)
    assert (data.input_shape, data.classes) == ((4, 5, 3), 3)
    for split, examples in (("train", data.train()), ("test", data.test())):
        count = tiny_images.EXAMPLES[split]
        expected = np.stack([tiny_images.image(split, number) for number in range(count)])
        np.testing.assert_array_equal(examples["inputs"], expected)
        assert examples["inputs"].dtype == np.uint8
        np.testing.assert_array_equal(examples["targets"], np.arange(count) % 3)
        assert examples["targets"].dtype == np.int32


def test_a_source_reads_by_number_and_is_a_sequence(data):
    source = data.train_source()
    assert len(source) == 12
    for number, example in zip((5, 0, 5), source.__getitems__([5, 0, 5]), strict=True):
        np.testing.assert_array_equal(example["inputs"], tiny_images.image("train", number))
        assert example["targets"] == number % 3 and example["targets"].dtype == np.int32
    assert (source[-1]["inputs"] == source[11]["inputs"]).all()
    assert [example["targets"] for example in source] == [n % 3 for n in range(12)]
    assert source.__getitems__([]) == []
    with pytest.raises(IndexError):
        source[12]


def test_a_source_is_pickled_without_its_open_files(data, monkeypatch):
    source = data.test_source()
    before = pickle.dumps(source)
    assert source[3]["targets"] == 0
    assert pickle.dumps(source) == before and len(before) < 1000
    opened = []
    original = tfds.builder_from_directory
    monkeypatch.setattr(
        tfds, "builder_from_directory", lambda folder: opened.append(folder) or original(folder)
    )
    there = pickle.loads(before)
    assert len(there) == 7 and not opened
    assert (there[6]["inputs"] == tiny_images.image("test", 6)).all()
    assert there[1]["targets"] == 1 and len(opened) == 1


def test_targets_are_read_without_decoding_an_image(tmp_path, monkeypatch):
    from PIL import Image

    kinds = tiny_images.features(mask=tfds.features.Image(shape=(None, None, 1)))
    tiny_images.write(tmp_path, kinds=kinds)
    data, original = load("tiny_images", tmp_path), Image.open
    monkeypatch.setattr(prepared, "_AT_ONCE", 5)  # pieces of 5, 5 and 2
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    np.testing.assert_array_equal(data.targets(), np.arange(12) % 3)
    assert data.targets().dtype == np.int32
    decoded = []
    monkeypatch.setattr(Image, "open", lambda file: decoded.append(file) or original(file))
    data.train()
    assert len(decoded) == 12 and isinstance(decoded[0], io.BytesIO)  # no mask is decoded


def test_batches_are_streamed_from_the_files(data):
    pytest.importorskip("grain")
    from jaxlocal.data.streaming import Stream

    indices = make_batches("dirichlet:5", data.targets(), 1, 2, 3, seed=0).indices
    with Stream(data.train_source(), indices) as stream:
        batches = stream(2, 4)
    examples, numbers = data.train(), indices(2, 4)
    for key in ("inputs", "targets"):
        np.testing.assert_array_equal(batches[key], examples[key][numbers])


def test_a_configuration_is_part_of_the_name(tmp_path):
    tiny_images.write(tmp_path, config="small")
    data = load("tiny_images/small", tmp_path)
    assert data.name == "tiny_images/small" and data.train_examples == 12


def test_the_held_out_split_is_test_else_validation(tmp_path):
    tiny_images.write(tmp_path, "one", examples={"train": 3, "validation": 2, "test": 1})
    tiny_images.write(tmp_path, "two", examples={"train": 3, "validation": 2})
    tiny_images.write(tmp_path, "three", examples={"train": 3, "extra": 2})
    assert len(load("one", tmp_path).test_source()) == 1
    examples = load("two", tmp_path).test()
    np.testing.assert_array_equal(examples["inputs"][1], tiny_images.image("validation", 1))
    assert "needs the splits train and test or validation, and has extra, train" in error_of(
        "three", tmp_path
    )


def test_the_label_is_the_feature_label_else_the_only_one(tmp_path):
    fine, coarse = (tfds.features.ClassLabel(num_classes=n) for n in (3, 4))
    tiny_images.write(tmp_path, "two", tiny_images.features(coarse_label=coarse))
    tiny_images.write(tmp_path, "one", tiny_images.features(label=None, digit=fine))
    tiny_images.write(tmp_path, "unclear", tiny_images.features(label=None, a=fine, b=coarse))
    assert load("two", tmp_path).classes == 3
    assert load("one", tmp_path).targets().tolist() == [n % 3 for n in range(12)]
    assert error_of("unclear", tmp_path) == (
        "dataset 'unclear' does not hold images with labels: its features are a, b, image, and "
        "none is clearly the label"
    )


def test_datasets_without_labelled_images_are_errors(tmp_path):
    depth = tfds.features.Image(shape=(4, 5, 1), dtype=np.uint16)
    tiny_images.write(tmp_path, "depth", tiny_images.features(image=depth))
    tiny_images.write(tmp_path, "no_image", tiny_images.features(image=None))
    assert "are uint16, not uint8" in error_of("depth", tmp_path)
    assert "its features are label, and none is clearly the image" in error_of("no_image", tmp_path)


def test_examples_without_labels_are_errors_when_they_are_read(tmp_path):
    tiny_images.write(tmp_path, label=-1)
    data = load("tiny_images", tmp_path)
    for read in (data.test, data.targets, lambda: data.train_source()[0]):
        with pytest.raises(ConfigurationError, match="of tiny_images have no label: label is -1"):
            read()


def test_damaged_files_are_one_sentence_for_every_reader(tmp_path):
    folder = tiny_images.write(tmp_path)
    data = load("tiny_images", tmp_path)
    (file,) = folder.glob("*-train*")
    file.write_bytes(file.read_bytes()[:100])
    assert "the files of tiny_images in" in error_of("tiny_images", tmp_path)
    for read in (data.train, data.targets, lambda: data.train_source()[0]):
        with pytest.raises(ConfigurationError, match="the files of tiny_images in .* are damaged"):
            read()
    assert data.test()["targets"].shape == (7,)


def test_an_unknown_name_is_an_error_with_the_nearest_names(tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    assert "unknown dataset 'cifar'; did you mean 'cifar10' or 'cifar100'?" in error_of(
        "cifar", tmp_path
    )
    assert "did you mean 'fashion_mnist'" in error_of("fashion_mnits", tmp_path)
    assert "did you mean 'two_quadratics'" in error_of("two_quadratic:7", tmp_path)
    assert "unknown configuration of emnist 'lettrs'; did you mean 'letters'" in error_of(
        "emnist/lettrs", tmp_path
    )
    assert "'kmnist' has no configurations, got 'kmnist/x'" in error_of("kmnist/x", tmp_path)
    for name in ("", "..", "../mnist", "a b", "tiny_images/", "cifar100:3.0.2"):
        assert "unknown dataset" in error_of(name, tmp_path)


@pytest.mark.parametrize("name", ["fashion_mnist", "emnist/letters", "svhn_cropped", "coco"])
def test_the_error_of_a_dataset_that_is_not_prepared_names_the_command(name, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    sentence = error_of(name, tmp_path)
    assert f"{name} is not prepared in {tmp_path}" in sentence
    assert f"python -m experiments.prepare --dataset={name} --data_dir=FOLDER" in sentence


def test_cifar100_is_centred_by_its_mean_and_scale(tmp_path):
    kinds = tiny_images.features(coarse_label=tfds.features.ClassLabel(num_classes=20))
    tiny_images.write(tmp_path, "cifar100", kinds)
    data = load("cifar100", tmp_path)
    grey = data.normalize(np.full((1, 1, 1, 3), 0.5, np.float32))
    # (0.5 - mean) / deviation of red, green and blue.
    expected = [(0.5 - 0.5071) / 0.2673, (0.5 - 0.4865) / 0.2564, (0.5 - 0.4409) / 0.2762]
    np.testing.assert_allclose(grey.ravel(), expected, rtol=1e-5)
