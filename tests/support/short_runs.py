"""Short runs of experiments.train, and what they leave in their folders."""

import dataclasses
import json
import shutil

import pytest

from experiments import train as binary
from experiments.building.config import Config
from experiments.running.recording import CHECKPOINTS, SUMMARY, read_metrics

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
    """Train a config in a folder; returns the exit status and the metrics."""
    status = binary.train(dataclasses.replace(config, workdir=str(folder)))
    return status, read_metrics(folder)


def without_time(lines):
    """The metrics without the seconds, in which no two runs agree."""
    return [{key: value for key, value in line.items() if key != "wall_seconds"} for line in lines]


def saved_steps(folder):
    """The steps of the checkpoints in a run's folder."""
    paths = (folder / CHECKPOINTS).glob("*")
    return sorted(int(path.name) for path in paths if path.name.isdecimal())


def check_other_devices(folder, train):
    """Assert that a run gives the same numbers on other numbers of devices, from its flags.txt as
    from its newest checkpoint; `train(devices, *flags)` calls the binary."""
    flags = ["--dataset=least_squares", "--model=linear", "--steps=50", "--momentum=0"]
    one, four = folder / "one", folder / "four"
    first = train(1, *flags, f"--workdir={one}")
    assert first.status == 0, first.error
    again = train(4, f"--flagfile={one / 'flags.txt'}", f"--workdir={four}")
    assert again.status == 0, again.error
    lines = [read_metrics(folder) for folder in (one, four)]
    for ours, theirs in zip(*lines, strict=True):
        assert ours["step"] == theirs["step"]
        # 50 steps of SGD: float32 sums in another order
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
    assert json.loads((four / SUMMARY).read_text())["devices"] == 4
    shutil.rmtree(one / CHECKPOINTS / "50")
    resumed = train(2, *flags, f"--workdir={one}")
    assert resumed.status == 0 and "resuming from step 45" in resumed.out
    last = read_metrics(one)[-1]
    assert last["step"] == 50
    assert last["train_loss"] == pytest.approx(lines[0][-1]["train_loss"], rel=1e-5)
