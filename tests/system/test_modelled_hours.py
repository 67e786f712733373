"""Hours of runs on a cluster, as axes of figures: values by hand, and where they are written."""

import csv
import re

import pytest

from experiments.building.config import Config
from experiments.reproducing import reproduce as reproducing
from experiments.reproducing.figure import parse_figure, read_figure
from experiments.reproducing.modelled_hours import clocks
from experiments.reproducing.reproduce import CSV, PICTURE, reproduce
from jaxlocal import ConfigurationError

# An all-reduce of these parameters takes two workers a second: their ring carries 1.25 GB in all.
CLUSTER = {"parameters": 312_500_000, "step_ms": 500.0, "bandwidth_gbps": 10.0}
FIGURE = """
title = "Local SGD over hours"
source = "nobody, 2026"
x = ["hours with a large model", "step"]
y = ["train_loss"]
[clusters."hours with a large model"]
parameters = 312500000
step_ms = 500
bandwidth_gbps = 10
[flags]
dataset = "least_squares"
model = "linear"
workers = 2
batch_size = 8
steps = 8
eval_every = 4
checkpoint_every = 0
learning_rate = 0.05
[small]
[[curves]]
name = "Local SGD"
flags = { period = "constant", local_steps = 4 }
"""


def seconds(steps, **flags):
    config = Config(dataset="least_squares", model="linear", workers=2, steps=10, **flags)
    clock = clocks(config, {"hours": CLUSTER})["hours"]
    return [pytest.approx(3600 * clock(step)) for step in steps]


def test_hours_by_hand():
    every = seconds([0, 1, 8], method="data_parallel")
    assert every == [0, 1.5, 12]
    # A round of 4 steps takes 3 s, and a part of one its share; the last round has 2 steps.
    local = seconds([0, 2, 4, 8, 9, 10], period="constant", local_steps=4)
    assert local == [0, 1.5, 3, 6, 7, 8]
    # A 25th of the values at each step, and a tenth at the end of a round of 5.
    cser = seconds(
        [5, 10], method="cser", gradient_compressor="grbs:25", reset_compressor="grbs:10",
        local_steps=5,
    )  # fmt: skip
    assert cser == [2.5 + 5 / 25 + 1 / 10, 2 * (2.5 + 5 / 25 + 1 / 10)]


def test_hours_are_written_and_drawn(tmp_path, monkeypatch):
    figure = lambda *_: parse_figure(FIGURE, "one", "small", Config())
    monkeypatch.setattr(reproducing, "read_figure", figure)
    assert reproduce("one", "small", tmp_path, None, 1) == 0
    rows = list(csv.DictReader((tmp_path / CSV).open()))
    hours = [float(row["hours with a large model"]) for row in rows]
    assert [row["step"] for row in rows] == ["0", "4", "8"]
    assert hours == pytest.approx([0, 3 / 3600, 6 / 3600])
    assert (tmp_path / PICTURE).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("step_ms", "step_mss", "unknown key 'step_mss'"),
        ("parameters = 312500000", "", "give the number of parameters"),
    ],
)
def test_a_wrong_cluster_is_told(before, after, words):
    with pytest.raises(ConfigurationError, match=words):
        parse_figure(FIGURE.replace(before, after), "one", "small", Config())


def test_a_cluster_that_does_not_fit_is_told_before_the_first_run(tmp_path, monkeypatch):
    text = re.sub("bandwidth_gbps.*", "", FIGURE)
    figure = lambda *_: parse_figure(text, "one", "small", Config())
    monkeypatch.setattr(reproducing, "read_figure", figure)
    with pytest.raises(ConfigurationError, match="bandwidth"):
        reproduce("one", "small", tmp_path, None, 1)
    assert not list(tmp_path.glob("**/metrics.jsonl"))


def test_steps_of_cser_time_follow_from_the_published_factors():
    clusters = read_figure("cser_time", "small", Config()).clusters
    for (axis, cluster), factor in zip(clusters.items(), (10, 4.5), strict=True):
        ring = 2 * 7 / 8 * 32 * cluster["parameters"] / 10e9
        step = cluster["step_ms"] / 1000
        assert (step + ring) / step == pytest.approx(factor, rel=2e-3), axis
