"""EMNIST letters from small idx files, which are written here byte by byte; damaged files."""

import gzip
import pickle

import numpy as np
import pytest

from jaxlocal.data import load
from jaxlocal.data.idx import IdxImages, read, read_shape
from jaxlocal.errors import ConfigurationError

COUNTS = {"train": 9, "test": 5}
IMAGES, LABELS = "emnist-letters-{}-images-idx3-ubyte", "emnist-letters-{}-labels-idx1-ubyte"


def idx(values, code=8):
    """The format: two zeros, the type, the axes; each size in four bytes, largest first."""
    header = bytes([0, 0, code, values.ndim])
    for size in values.shape:
        header += bytes([size >> 24 & 255, size >> 16 & 255, size >> 8 & 255, size & 255])
    return header + bytes(values.ravel().tolist())


def images_of(split):
    seed = sorted(COUNTS).index(split)
    return np.random.default_rng(seed).integers(256, size=(COUNTS[split], 6, 4), dtype=np.uint8)


def labels_of(split):
    return np.arange(COUNTS[split], dtype=np.uint8) % 26 + 1


@pytest.fixture
def folder(tmp_path):
    """Gzipped training files and plain test files, of images 4 high and 6 wide."""
    for split in COUNTS:
        for name, values in ((IMAGES, images_of(split)), (LABELS, labels_of(split))):
            data = idx(values)
            if split == "train":
                (tmp_path / f"{name.format(split)}.gz").write_bytes(gzip.compress(data))
            else:
                (tmp_path / name.format(split)).write_bytes(data)
    return tmp_path


def refused(folder, read=lambda data: data):
    with pytest.raises(ConfigurationError) as caught:
        read(load("emnist_letters", folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_letters_are_transposed_and_have_62_classes(folder):
    data = load("emnist_letters", folder)
    assert (data.train_examples, data.test_examples) == (9, 5)
    assert (data.input_shape, data.classes) == ((4, 6, 1), 62)
    for split, examples in (("train", data.train()), ("test", data.test())):
        stored = images_of(split)
        assert examples["inputs"].shape == (COUNTS[split], 4, 6, 1)
        for number, image in enumerate(examples["inputs"]):
            np.testing.assert_array_equal(image[..., 0], stored[number].T)
        assert examples["inputs"].dtype == np.uint8 and examples["targets"].dtype == np.int32
        np.testing.assert_array_equal(examples["targets"], labels_of(split))
    np.testing.assert_array_equal(data.targets(), labels_of("train"))
    np.testing.assert_array_equal(
        data.normalize(data.test()["inputs"]).max(),
        np.float32(1.0) * (images_of("test").max() / np.float32(255)),
    )


def test_a_source_reads_by_number_and_is_pickled_without_its_images(folder):
    source = load("emnist_letters", folder).train_source()
    before = pickle.dumps(source)
    assert len(source) == 9 and source.__getitems__([3, 0])[0]["targets"] == 4
    assert pickle.dumps(source) == before and len(before) < 1000
    np.testing.assert_array_equal(
        pickle.loads(before)[8]["inputs"][..., 0], images_of("train")[8].T
    )


def test_a_plan_reads_headers_only(folder, monkeypatch):
    monkeypatch.setattr("jaxlocal.data.idx.read", lambda *_: pytest.fail("read"))
    assert load("emnist_letters", folder).train_examples == 9


@pytest.mark.parametrize("within", ["emnist_letters", "emnist", "gzip"])
def test_files_may_lie_in_a_folder_of_their_own(folder, within, tmp_path_factory, monkeypatch):
    outer = tmp_path_factory.mktemp("outer")
    folder.rename(outer / within)
    monkeypatch.setenv("TFDS_DATA_DIR", str(outer))
    assert load("emnist_letters").test_examples == 5
    (outer / within).rename(folder)


def test_missing_files_are_named_with_their_source(folder, monkeypatch):
    (folder / LABELS.format("test")).unlink()
    assert f"{LABELS.format('test')}.gz, which is not in {folder}: it is in" in refused(folder)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert "original files (https://www.nist.gov/" in refused(None)


def change(folder, change, split="train", name=IMAGES):
    path = folder / (name.format(split) + (".gz" if split == "train" else ""))
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("left", [0, 5, 11, 40])
def test_a_truncated_gzip_file_is_one_sentence(folder, left):
    change(folder, lambda data: data[:left])
    sentence = refused(folder, lambda data: data.train())
    assert "train-images-idx3-ubyte.gz" in sentence and (
        "cannot be read" in sentence or "damaged" in sentence or "magic number is 0x," in sentence
    )


def test_a_flipped_byte_of_a_gzip_file_is_one_sentence(folder):
    change(folder, lambda data: data[:-6] + bytes([data[-6] ^ 1]) + data[-5:])  # of the checksum
    assert "CRC check failed" in refused(folder, lambda data: data.train())


@pytest.mark.parametrize(
    "new, sentence",
    [
        (lambda data: data[:-1], "header says 120 values, and it holds 119"),
        (lambda data: data + b"x", "header says 120 values, and it holds 121"),
        (lambda data: data[:9], "is damaged: it ends in its header"),
        (lambda data: b"\0\0\x0d\x03" + data[4:], "number is 0x00000d03, not 0x00000803"),
        (lambda data: b"<html>", "number is 0x3c68746d, not 0x00000803"),
        (lambda data: b"", "number is 0x, not 0x00000803"),
        (lambda data: data[:4] + b"\0\0\0\4" + data[8:], "it holds 4 images, and .* 5 labels"),
        (
            lambda data: data[:8] + b"\xff" * 8 + data[16:],
            "says 92,233,.* values, and it holds 120",
        ),
    ],
)
def test_damaged_files_are_one_sentence(folder, new, sentence):
    change(folder, new, "test")
    with pytest.raises(ConfigurationError, match=sentence):
        load("emnist_letters", folder).test()


def test_labels_are_classes(folder):
    change(folder, lambda data: data[:-1] + bytes([62]), "test", LABELS)
    message = "the labels of emnist_letters go from 1 to 62, and it has 62 classes"
    for use in (lambda data: data.test(), lambda data: data.test_source()[0]):
        assert message in refused(folder, use)


def test_mnist_files_are_not_transposed(tmp_path):
    (tmp_path / "images").write_bytes(idx(images_of("test")))
    (tmp_path / "labels").write_bytes(idx(labels_of("test")))
    source = IdxImages("mine", tmp_path / "images", tmp_path / "labels", classes=27)
    assert source.shape == source[0]["inputs"].shape == (6, 4, 1)
    assert read_shape(tmp_path / "images", 3) == (5, 6, 4)
    np.testing.assert_array_equal(read(tmp_path / "images", 3), images_of("test"))
    with pytest.raises(ConfigurationError, match="cannot be read: No such file or directory"):
        read(tmp_path / "none", 1)
