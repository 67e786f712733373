"""A run that was stopped is resumed as if it had never stopped."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from short_runs import saved_steps, without_time

from experiments.building.config import Config
from experiments.building.job import build_job
from experiments.launching.statuses import INTERRUPTED
from experiments.plotting.display import Display
from experiments.running.recording import CHECKPOINTS, METRICS, SUMMARY, read_metrics
from experiments.running.training import train
from jaxlocal import ConfigurationError

ROOT = Path(__file__).parents[2]
SMALL = Config(
    dataset="least_squares",
    model="linear",
    workers=4,
    batch_size=8,
    steps=40,
    local_steps=4,
    eval_every=7,
    checkpoint_every=5,
    export=True,
)
RUNS = {
    "qsr": {"period_coefficient": 0.08},
    "mll_sgd": {
        "method": "mll_sgd",
        "hubs": 2,
        "local_steps": 2,
        "hub_period": 2,
        "rates": "0.5,1",
        "stream": True,
        "stream_workers": 0,
    },
    "diloco": {"method": "diloco", "local_steps": 8, "optimizer": "adamw", "learning_rate": 0.01},
    "streaming_diloco": {
        "method": "streaming_diloco",
        "fragments": 1,
        "delay_steps": 3,
        "local_steps": 6,
        "rates": "0.5,1,1,1",
    },
}


class Crash(BaseException):
    """An error that no program catches."""


def run(config, folder):
    """Train; returns the exit status, the metrics without times, and the exported model."""
    status = train(dataclasses.replace(config, workdir=str(folder)))
    model = (folder / "export" / "model.safetensors").read_bytes()
    return status, without_time(read_metrics(folder)), model


def crash_at(monkeypatch, step):
    """Crash once, at the first measurement or checkpoint from a step on."""
    show = Display.show

    def crashing(self, now, measured):
        if now.step >= step:
            monkeypatch.setattr(Display, "show", show)
            raise Crash
        show(self, now, measured)

    monkeypatch.setattr(Display, "show", crashing)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "streaming_diloco")) for name in RUNS],
)
def test_a_run_that_crashes_again_and_again_ends_bit_identical(name, tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, **RUNS[name])
    whole = run(config, tmp_path / "whole")
    crashed = dataclasses.replace(config, workdir=str(tmp_path / "crashed"))
    for step in (3, 17, 32):
        crash_at(monkeypatch, step)
        with pytest.raises(Crash):
            train(crashed)
    again = run(config, tmp_path / "crashed")
    assert again == whole
    steps = [line["step"] for line in again[1]]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 40
    seconds = [line["wall_seconds"] for line in read_metrics(tmp_path / "crashed")]
    assert seconds == sorted(seconds)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended") / "run"
    return folder, run(SMALL, folder)


def test_a_run_that_has_ended_is_not_run_again(ended, tmp_path, capsys):
    shutil.copytree(ended[0], tmp_path / "run")
    metrics = (tmp_path / "run" / METRICS).read_bytes()
    shutil.rmtree(tmp_path / "run" / "export")
    assert run(SMALL, tmp_path / "run") == ended[1]  # which exports again
    assert (tmp_path / "run" / METRICS).read_bytes() == metrics
    assert "has ended" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / SUMMARY).read_text())["ended"] == "finished"


def test_the_export_is_the_average_model(ended):
    weights = load_file(ended[0] / "export" / "model.safetensors")
    assert {name: x.shape for name, x in weights.items()} == {"params/map/kernel": (32, 1)}
    data = build_job(SMALL).dataset.test()
    outputs = data["inputs"].astype(np.float64) @ weights["params/map/kernel"][:, 0]
    loss = 0.5 * np.mean((outputs - data["targets"]) ** 2)
    np.testing.assert_allclose(ended[1][1][-1]["eval_loss"], loss, rtol=1e-5)


def test_how_often_a_run_is_saved_does_not_make_it_another(ended, tmp_path):
    shutil.copytree(ended[0], tmp_path / "run")
    other = dataclasses.replace(SMALL, checkpoint_every=11, keep=1, plot_partition=True)
    assert run(other, tmp_path / "run") == ended[1]
    assert (tmp_path / "run" / "partition.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    config = dataclasses.replace(SMALL, stop_train_loss=0.1, eval_every=1)
    first = run(config, tmp_path / "run")
    assert first[1][-1]["train_loss"] < 0.1 and first[1][-1]["step"] < 40
    assert run(config, tmp_path / "run") == first


ELSEWHERE = [
    pytest.param(file, marks=pytest.mark.slow)
    for file in ("state/_METADATA", "notes", "manifest/metadata")
]


@pytest.mark.parametrize("file", ["state/d", *ELSEWHERE])
def test_a_run_with_a_damaged_newest_checkpoint_ends_bit_identical(ended, tmp_path, file):
    shutil.copytree(ended[0], tmp_path / "run")
    newest = tmp_path / "run" / CHECKPOINTS / "40"
    damaged = newest / file
    shutil.rmtree(damaged) if damaged.is_dir() else damaged.write_text('{"tree_meta')
    with pytest.warns(UserWarning, match="40 is damaged .*40.damaged.* resumes from step 35"):
        assert run(SMALL, tmp_path / "run") == ended[1]
    assert saved_steps(tmp_path / "run") == [35, 40]
    assert newest.with_name("40.damaged").exists()


def test_a_run_whose_checkpoints_are_all_damaged_says_how_to_start_again(ended, tmp_path):
    shutil.copytree(ended[0], tmp_path / "run")
    before = (tmp_path / "run" / METRICS).read_bytes()
    for step in ("35", "40"):
        (tmp_path / "run" / CHECKPOINTS / step / "notes" / "metadata").write_text("{}")
    with pytest.raises(ConfigurationError, match="can be used; the newest, 40, .*delete"):
        run(SMALL, tmp_path / "run")
    assert (tmp_path / "run" / METRICS).read_bytes() == before


def test_checkpoints_without_metrics_are_refused(ended, tmp_path):
    shutil.copytree(ended[0], tmp_path / "run")
    (tmp_path / "run" / METRICS).unlink()
    with pytest.raises(ConfigurationError, match="checkpoint of step 40 but no metrics.jsonl"):
        run(SMALL, tmp_path / "run")


def test_checkpoints_with_missing_or_damaged_metrics_are_refused(ended, tmp_path):
    shutil.copytree(ended[0], tmp_path / "run")
    lines = (tmp_path / "run" / METRICS).read_text().splitlines(keepends=True)
    (tmp_path / "run" / METRICS).write_text("".join(lines[:3]))
    with pytest.raises(ConfigurationError, match="holds 3 of the 7 measurements up to step 40"):
        run(SMALL, tmp_path / "run")
    (tmp_path / "run" / METRICS).write_text("null\n" + "".join(lines))
    with pytest.raises(ConfigurationError, match="damaged: its line 1 is not a measurement"):
        run(SMALL, tmp_path / "run")


def test_a_run_that_is_no_longer_saved_still_resumes(ended, tmp_path):
    shutil.copytree(ended[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS / "40")
    assert run(dataclasses.replace(SMALL, checkpoint_every=0), tmp_path / "run") == ended[1]
    assert saved_steps(tmp_path / "run") == [35]


def test_an_interrupted_run_is_saved_at_its_step(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, checkpoint_every=40, workdir=str(tmp_path / "run"))
    show = Display.show

    def interrupted(self, now, measured):
        show(self, now, measured)
        if now.step == 21:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Display, "show", interrupted)
    assert train(config) == INTERRUPTED
    assert saved_steps(tmp_path / "run") == [21]
    monkeypatch.setattr(Display, "show", show)
    assert run(config, tmp_path / "run") == run(SMALL, tmp_path / "whole")


def test_without_checkpoints_a_run_starts_again(tmp_path):
    config = dataclasses.replace(SMALL, checkpoint_every=0)
    first = run(config, tmp_path / "run")
    assert not (tmp_path / "run" / CHECKPOINTS).exists()
    assert run(config, tmp_path / "run") == first


FLAGS = ("--dataset=digits", "--model=mlp", "--workers=2", "--steps=200", "--checkpoint_every=10")


def start(folder):
    command = [sys.executable, "-m", "experiments.train", *FLAGS, f"--workdir={folder}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes)


@pytest.mark.slow
def test_a_killed_process_resumes_and_a_full_disk_loses_nothing(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    reference = start(whole)
    killed = start(cut)
    while killed.poll() is None and not saved_steps(cut):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    reference.communicate(timeout=120)
    assert reference.returncode == 0 and killed.returncode == -signal.SIGKILL
    assert saved_steps(cut) and saved_steps(cut)[-1] < 200, "killed too late"
    # The full disk is a limit on the size of files, which checkpoints exceed and metrics do not.
    full = start(cut)
    resource.prlimit(full.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    _, error = full.communicate(timeout=120)
    assert full.returncode == 1
    assert error.startswith("error: a checkpoint could not be written")
    assert error.count("\n") == 1, error
    assert saved_steps(cut), "the last good checkpoint stays"
    last = start(cut)
    out, _ = last.communicate(timeout=120)
    assert last.returncode == 0 and "resuming from step" in out
    assert without_time(read_metrics(cut)) == without_time(read_metrics(whole))
