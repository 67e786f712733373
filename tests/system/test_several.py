"""Several seeds in one command: each run is that of its seed, and the summary has their mean."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.building.config import Config
from experiments.running.recording import CURVES, FLAGS, METRICS, SUMMARY, read_metrics
from experiments.running.training import train
from jaxlocal import ConfigurationError

THREE = Config(
    dataset="least_squares",
    model="linear",
    workers=4,
    batch_size=8,
    steps=8,
    local_steps=4,
    eval_every=4,
    seed=5,
    seeds=3,
)


def test_a_command_runs_several_seeds(tmp_path, capsys):
    folder = tmp_path / "three"
    config = dataclasses.replace(THREE, workdir=str(folder))
    assert train(config) == 0
    runs = [read_metrics(folder / f"seed_{seed}") for seed in (5, 6, 7)]
    alone = dataclasses.replace(THREE, seed=6, seeds=1, workdir=str(tmp_path / "alone"))
    assert train(alone) == 0
    for line, other in zip(runs[1], read_metrics(tmp_path / "alone"), strict=True):
        assert line | {"wall_seconds": 0} == other | {"wall_seconds": 0}

    summary = json.loads((folder / SUMMARY).read_text())
    losses = [lines[-1]["eval_loss"] for lines in runs]
    assert len(set(losses)) == 3 and summary["seeds"] == [5, 6, 7]
    assert summary["eval_loss"]["values"] == losses
    np.testing.assert_allclose(summary["eval_loss"]["mean"], sum(losses) / 3)
    error = np.sqrt(sum((x - sum(losses) / 3) ** 2 for x in losses) / 2 / 3)
    np.testing.assert_allclose(summary["eval_loss"]["error"], error)
    assert "eval_accuracy" not in summary  # a regression has none
    assert summary["ended"] == ["finished"] * 3
    assert (folder / CURVES).read_bytes().startswith(b"\x89PNG")
    assert "--seeds=3" in (folder / FLAGS).read_text()

    written = [(folder / f"seed_{seed}" / METRICS).read_bytes() for seed in (5, 6, 7)]
    capsys.readouterr()
    assert train(config) == 0  # nothing is run again
    assert written == [(folder / f"seed_{seed}" / METRICS).read_bytes() for seed in (5, 6, 7)]
    assert capsys.readouterr().out.count("has ended") == 3


def test_a_mistake_leaves_no_files(tmp_path):
    folder = tmp_path / "bad"
    for wrong in ({"method": "local_sdg"}, {"seed": (1 << 32) - 1}, {"batch_size": 5000}):
        with pytest.raises(ConfigurationError):
            train(dataclasses.replace(THREE, workdir=str(folder), **wrong))
        assert not folder.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        train(dataclasses.replace(THREE, workdir=str(tmp_path / "file" / "run")))
