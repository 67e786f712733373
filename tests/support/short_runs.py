"""Short runs of experiments.train, and what they leave."""

import dataclasses

from experiments import train as binary
from experiments.building.config import Config
from experiments.running.recording import read_metrics

SMALL = Config(
    dataset="least_squares",
    model="linear",
    workers=4,
    batch_size=8,
    steps=24,
    local_steps=2,
    momentum=0.0,
    eval_every=6,
)


def run(config, folder):
    status = binary.train(dataclasses.replace(config, workdir=str(folder)))
    return status, read_metrics(folder)


def without_time(lines):
    return [{key: value for key, value in line.items() if key != "wall_seconds"} for line in lines]
