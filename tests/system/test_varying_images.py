"""A run on JPEG files of varying size, as ImageNet has them, and what it refuses."""

import dataclasses
import io

import numpy as np
import pytest
import tiny_images
from short_runs import run, without_time

from experiments.building.config import Config
from experiments.building.job import build_job
from jaxlocal import ConfigurationError

tfds = pytest.importorskip("tensorflow_datasets")
Image = pytest.importorskip("PIL.Image")

CONFIG = Config(
    dataset="varying", image_size=8, model="logistic", workers=2, batch_size=4, steps=8,
    eval_every=4, checkpoint_every=0, stream=True, stream_workers=0, learning_rate=0.3,
)  # fmt: skip


def encoded(split, number):
    """A class is a colour; sides vary."""
    shape = (20 + 3 * number, 30 + number, 3)
    noise = np.random.default_rng(number).integers(0, 60, shape)
    noise[..., number % tiny_images.CLASSES] += 150
    file = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(file, "jpeg")
    return file.getvalue()


@pytest.fixture
def config(tmp_path):
    kinds = tiny_images.features(image=tfds.features.Image(shape=(None, None, 3)))
    tiny_images.write(tmp_path / "data", "varying", kinds, encoded=encoded)
    return dataclasses.replace(CONFIG, data_dir=str(tmp_path / "data"))


@pytest.mark.slow
def test_it_trains_with_every_augmentation_and_any_reader(config, tmp_path):
    every = "resized_crop:0.5,flip,randaugment:1:2,jitter:0.1,pca"
    config = dataclasses.replace(config, augment=every)
    ends = []
    for processes in (0, 1):
        chosen = dataclasses.replace(config, stream_workers=processes)
        status, lines = run(chosen, tmp_path / str(processes))
        assert status == 0 and lines[-1]["train_loss"] < 0.7 * lines[0]["train_loss"]
        ends.append(without_time(lines))
    assert ends[0] == ends[1]
    assert ends[0][-1]["eval_accuracy"] > 0.8  # of 1/3 by chance


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"stream": False}, "the images of varying vary in size, so that it needs --stream"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"dataset": "digits"}, r"size, here 8, is for images of varying size, .* \[8, 8, 1\]"),
    ],
)
def test_mistakes_are_one_sentence(flags, words, config):
    with pytest.raises(ConfigurationError, match=words):
        build_job(dataclasses.replace(config, **flags))
