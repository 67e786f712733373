"""The digits of scikit-learn: its examples, and the same split for every seed."""

import numpy as np
import pytest

from jaxlocal.data import digits, load

datasets = pytest.importorskip("sklearn.datasets")


def test_they_are_those_of_scikit_learn(monkeypatch):
    expected = np.column_stack(datasets.load_digits(return_X_y=True))
    assert (digits._rows() == expected).all()
    monkeypatch.setattr(digits, "_FILE", "elsewhere.csv.gz")
    assert (digits._rows.__wrapped__() == expected).all()


def test_images_and_labels_belong_together():
    images = datasets.load_digits()
    known = {
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(images.images, images.target, strict=True)
    }
    data = load("digits")
    read = [
        (image.tobytes(), int(label))
        for part in (data.train(), data.test())
        for image, label in zip(part["inputs"], part["targets"], strict=True)
    ]
    assert len(read) == 1797 and set(read) == known


def test_a_fifth_of_every_label_is_held_out_for_every_seed():
    data = load("digits", seed=5)
    train, test = data.train(), data.test()
    for examples, count in ((train, data.train_examples), (test, data.test_examples)):
        assert examples["inputs"].shape == (count, *data.input_shape)
        assert examples["inputs"].dtype == np.uint8 and examples["targets"].dtype == np.int32
    shares = np.bincount(test["targets"]) / np.bincount(train["targets"])
    # Each count is within one of a fifth.
    np.testing.assert_allclose(shares, 0.25, atol=0.015)
    assert train["inputs"].min() == 0 and train["inputs"].max() == 255
    assert (load("digits", seed=6).test()["inputs"] == test["inputs"]).all()
