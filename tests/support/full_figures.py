"""Figures at full scale, whose settings take two steps on random images."""

import dataclasses
import re

import numpy as np
from short_runs import run

from experiments.building import job
from experiments.building.config import Config
from experiments.reproducing.figure import names, read_figure, scales
from experiments.running import measuring
from jaxlocal.data import load
from jaxlocal.data.dataset import Dataset
from jaxlocal.data.examples import ArraySource

# Shape of an image and number of classes; images of ImageNet are smaller than those of training.
IMAGES = {
    "mnist_binary": ((28, 28, 1), 2),
    "mnist": ((28, 28, 1), 10),
    "emnist/letters": ((28, 28, 1), 62),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "imagenet2012": ((64, 64, 3), 1000),
}
TRAIN, TEST = 200, 4
# Large models compile for minutes: one setting of a figure trains it, the others a small one.
SMALLER = {
    "resnet18_imagenet": "tiny_resnet_batch_norm",
    "resnet18_layer_norm": "tiny_resnet_layer_norm",
    "resnet152": "tiny_resnet_batch_norm",
    "vit_b16": "tiny_vit",
    "wide_resnet_40_8": "tiny_resnet_batch_norm",
}
# Partitions that are iid have no shares of the data for which they need several workers.
WORKERS = {"iid": 2}


def trained(on_imagenet):
    """Names of the figures that are trained at full scale, on ImageNet or on other data."""
    full = [read_figure(name, "full", Config()) for name in names() if "full" in scales(name)]
    of_data = lambda figure: "imagenet2012" in {one.config.dataset for one in figure.curves}
    full = [figure for figure in full if of_data(figure) == on_imagenet]
    return [figure.name for figure in full if figure.kind != "plan"]


def random_images(spec, data_dir, seed, *_):
    """Random images in the place of a dataset that must be prepared."""
    if spec not in IMAGES:
        return load(spec, data_dir, seed)
    shape, classes = IMAGES[spec]

    def source(count):
        random = np.random.default_rng(seed)
        return ArraySource(
            {
                "inputs": random.integers(0, 256, (count, *shape), np.uint8),
                "targets": random.integers(0, classes, count).astype(np.int32),
            }
        )

    return Dataset(
        spec, lambda: source(TRAIN), lambda: source(TEST), TRAIN, TEST, shape, classes,
        mean=(0.5,) * shape[-1], scale=(0.25,) * shape[-1],
    )  # fmt: skip


def reduced(config: Config) -> Config:
    """Two steps of the same settings, in rounds of one, with fewer workers and small batches."""
    steps = {"steps": None, "rounds": 2} if config.rounds else {"steps": 2}
    decay = {"decay_steps": "1"} if config.decay_steps or config.decay_epochs else {}
    rule = {"period": config.period and "constant", "period_coefficient": None}
    averages = {} if config.swa_start is None else {"swa_start": min(config.swa_start, 1)}
    local_steps = 2 if config.cser_implementation == "released" else 1  # a message of each kind
    workers = max(config.hubs, WORKERS.get(config.partition, 10))
    return dataclasses.replace(
        config, **steps, **decay, **rule, **averages, workers=min(config.workers, workers),
        batch_size=min(config.batch_size, 2), accumulation=min(config.accumulation, 2),
        local_steps=local_steps, hub_period=1, warmup_steps=0, eval_every=2, checkpoint_every=0,
        epochs=None, warmup_epochs=None, decay_epochs=None, stream_workers=0,
        train_eval_examples=4, test_eval_examples=4,
    )  # fmt: skip


def first(curve):
    """The config of a curve with the first of its tuned values."""
    return dataclasses.replace(curve.config, **{flag: of[0] for flag, of in curve.tune.items()})


def take_two_steps(name, folder, monkeypatch):
    """Assert that each setting of a figure takes two steps."""
    monkeypatch.setattr(job, "_load", random_images)
    monkeypatch.setattr(measuring, "REESTIMATION_EXAMPLES", 4)
    # Of curves that differ only in a compression ratio the last is run, with the largest.
    ones = [reduced(first(curve)) for curve in read_figure(name, "full", Config()).curves]
    chosen = {re.sub(r"grbs(_tensors)?:\d+", "grbs", str(one)): one for one in ones}.values()
    for number, config in enumerate(sorted(chosen, key=str)):
        model = SMALLER.get(config.model, config.model) if number else config.model
        config = dataclasses.replace(config, model=model)
        status, lines = run(config, folder / str(number))
        assert status == 0 and lines[-1]["step"] == 2
        assert np.isfinite(lines[-1]["train_loss"])
