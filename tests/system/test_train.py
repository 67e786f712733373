"""A run from its flags to its folder: what it writes, that it is repeatable, and what stops it."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import socket

import pytest
from short_runs import SMALL, run, without_time

from experiments.building.job import build_job, make_round_fn
from experiments.launching.statuses import FAILED, INTERRUPTED, Failure
from experiments.running.locking import LOCK, locked
from experiments.running.measuring import Measure
from experiments.running.recording import (
    CHECKPOINTS,
    CURVES,
    FLAGS,
    METRICS,
    PREVIOUS,
    SUMMARY,
    TENSORBOARD,
    read_metrics,
)
from experiments.running.saving import Saver
from experiments.running.training import train
from jaxlocal import ConfigurationError

KEYS = [
    *("step", "round", "time_slots", "wall_seconds", "train_loss", "eval_loss", "eval_accuracy"),
    *("learning_rate", "local_steps", "consensus_distance", "bits_workers", "bits_hubs"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "run"
    return folder, run(SMALL, folder)


def test_a_run_leaves_its_files_and_a_line_per_measurement(small):
    folder, (status, lines) = small
    assert status == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [METRICS, SUMMARY, CURVES, FLAGS, CHECKPOINTS, TENSORBOARD, LOCK]
    )
    assert [line["step"] for line in lines] == [0, 6, 12, 18, 24]
    assert all(list(line) == KEYS for line in lines)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] / 2
    assert all(line["eval_accuracy"] is None for line in lines)
    assert (folder / CURVES).read_bytes().startswith(b"\x89PNG")


def test_the_bits_are_a_model_for_every_round(small):
    _, (_, lines) = small
    model_bits = 32 * 32  # 32 float32 parameters
    for line in lines:
        assert line["bits_workers"] == line["round"] * model_bits
        assert line["bits_hubs"] == 0
    assert lines[0]["round"] == 0 and lines[0]["consensus_distance"] == 0


def test_the_summary_has_the_reason_of_the_end(small):
    folder, (_, lines) = small
    summary = json.loads((folder / SUMMARY).read_text())
    assert summary["ended"] == "finished"
    assert summary["train_loss"] == lines[-1]["train_loss"]
    assert summary["flags"] == (folder / FLAGS).read_text().splitlines()


def test_the_same_flags_give_the_same_numbers(small, tmp_path):
    _, (_, lines) = small
    assert without_time(run(SMALL, tmp_path / "again")[1]) == without_time(lines)


def test_another_seed_gives_other_numbers(small, tmp_path):
    _, (_, lines) = small
    other = run(dataclasses.replace(SMALL, seed=1), tmp_path / "other")[1]
    assert other[-1]["train_loss"] != lines[-1]["train_loss"]


def test_measuring_does_not_change_the_run(small, tmp_path):
    _, (_, lines) = small
    rare = run(dataclasses.replace(SMALL, eval_every=24), tmp_path / "rare")[1]
    assert rare[-1]["train_loss"] == lines[-1]["train_loss"]


def test_a_folder_of_other_flags_is_left_alone(small):
    folder, (_, lines) = small
    with pytest.raises(ConfigurationError, match="it has --batch_size=8, this run --batch_size=4"):
        run(dataclasses.replace(SMALL, batch_size=4), folder)
    assert read_metrics(folder) == lines


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / METRICS).write_text("mine\n")
    with pytest.raises(ConfigurationError, match="not a run"):
        run(SMALL, tmp_path)
    assert (tmp_path / METRICS).read_text() == "mine\n"


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        run(SMALL, tmp_path / "file")


def test_training_stops_below_a_loss(tmp_path):
    config = dataclasses.replace(SMALL, stop_train_loss=0.2, eval_every=1)
    status, lines = run(config, tmp_path / "run")
    assert status == 0
    assert lines[-1]["train_loss"] < 0.2 <= lines[-2]["train_loss"]
    assert "training loss" in json.loads((tmp_path / "run" / SUMMARY).read_text())["ended"]


def test_divergence_ends_the_run_and_keeps_what_was_measured(tmp_path):
    config = dataclasses.replace(SMALL, learning_rate=1e9, schedule="constant", steps=60)
    status, lines = run(config, tmp_path / "run")
    ended = json.loads((tmp_path / "run" / SUMMARY).read_text())["ended"]
    assert status == FAILED
    assert lines[0]["step"] == 0 and all(math.isfinite(line["train_loss"]) for line in lines)
    assert "worker" in ended and "step" in ended
    assert (tmp_path / "run" / CURVES).exists()


def interrupt_at(monkeypatch, step):
    """Press Ctrl-C at every measurement from a step on."""
    measure = Measure.__call__

    def interrupted(self, progress):
        if progress.step >= step:
            signal.raise_signal(signal.SIGINT)
        return measure(self, progress)

    monkeypatch.setattr(Measure, "__call__", interrupted)


def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 12)
    status, lines = run(SMALL, tmp_path / "run")
    assert status == INTERRUPTED
    assert [line["step"] for line in lines] == [0, 6, 12]
    sentence = f"interrupted at step 12; the same command resumes from step 12, in {tmp_path}/run"
    assert capsys.readouterr().err == f"error: {sentence}\n"
    assert json.loads((tmp_path / "run" / SUMMARY).read_text())["ended"] == "interrupted"


@pytest.mark.slow
def test_a_compressed_run_that_is_resumed_ends_with_the_same_numbers(tmp_path, monkeypatch):
    """A checkpoint has the anchor, the residuals and the keys of the masks."""
    config = dataclasses.replace(
        SMALL, method="qsparse_local_sgd", sync_compressor="random_k:4", checkpoint_every=6
    )
    whole = run(config, tmp_path / "whole")[1]
    with monkeypatch.context() as patched:
        interrupt_at(patched, 18)
        assert run(config, tmp_path / "resumed")[0] == INTERRUPTED
    status, lines = run(config, tmp_path / "resumed")
    assert status == 0 and without_time(lines) == without_time(whole)


def tensorboard(folder):
    """Every scalar of the event files of TensorBoard: pairs of step and value by tag."""
    from tensorboardX.proto import event_pb2

    scalars = {}
    for path in folder.iterdir():
        data, place = path.read_bytes(), 0
        while place < len(data):  # the length, a checksum, the event, a checksum
            size = int.from_bytes(data[place : place + 8], "little")
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + size])
            place += 16 + size
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def test_tensorboard_has_the_measurements(small):
    folder, (_, lines) = small
    scalars = tensorboard(folder / TENSORBOARD)
    for name in ("train_loss", "eval_loss", "learning_rate", "bits_workers"):
        expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
        assert scalars[name] == expected
    assert "eval_accuracy" not in scalars  # a regression has none


def test_index_batches_stay_small():
    assert make_round_fn(build_job(SMALL)).chunks(10_000).__next__() == 256


def test_a_run_whose_last_step_diverges_has_failed(tmp_path):
    config = dataclasses.replace(SMALL, steps=1, learning_rate=1e30, eval_every=1)
    status, lines = run(config, tmp_path / "run")
    assert status == FAILED and lines[-1]["train_loss"] is None
    assert "average model's loss" in json.loads((tmp_path / "run" / SUMMARY).read_text())["ended"]


def test_interrupted_reruns_keep_the_metrics_they_were_to_replace(tmp_path, monkeypatch, capsys):
    unsaved = dataclasses.replace(SMALL, checkpoint_every=0)
    run(unsaved, tmp_path / "run")
    before = (tmp_path / "run" / METRICS).read_text()

    interrupt_at(monkeypatch, 6)
    for _ in range(2):
        assert run(unsaved, tmp_path / "run")[0] == INTERRUPTED
        assert "at step 6; the same command starts again" in capsys.readouterr().err
        assert (tmp_path / "run" / PREVIOUS).read_text() == before


def test_before_the_first_step_an_interrupt_ends_at_once(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 0)
    before = signal.getsignal(signal.SIGINT)  # it is ignored where pytest is a background job
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_interrupt_ends_at_once(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 12)
    monkeypatch.setattr(Saver, "save", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, tmp_path / "run")


def test_a_folder_in_which_a_run_is_under_way_is_left_alone(small):
    folder, (_, lines) = small
    with locked(folder), pytest.raises(ConfigurationError) as error:
        run(SMALL, folder)
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert f"the workdir {folder} is in use by {holder}; wait" in str(error.value)
    assert read_metrics(folder) == lines


def test_the_lock_is_held_in_the_folder_of_all_seeds_too(tmp_path):
    several = dataclasses.replace(SMALL, seeds=2, workdir=str(tmp_path))
    with locked(tmp_path), pytest.raises(ConfigurationError, match="is in use by process"):
        train(several)
    with locked(tmp_path / "seed_1"), pytest.raises(ConfigurationError, match="seed_1 is in use"):
        train(several)
    assert not (tmp_path / "seed_1" / FLAGS).exists()


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available.*no second run"):
        assert run(SMALL, tmp_path / "run")[0] == 0


def test_a_picture_that_cannot_be_written_is_named(small, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.copytree(small[0], tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr("experiments.running.reporting.plot_curves", full)
        with pytest.raises(Failure, match="curves.png could not be written: No space left"):
            run(SMALL, tmp_path / "run")
    assert run(SMALL, tmp_path / "run") == small[1]
