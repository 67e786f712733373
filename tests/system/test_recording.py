"""The files of a run's folder: damaged ones are told apart from incomplete ones, and a full disk
names the file that it was."""

import contextlib
import errno
import io
import json
import os
import shutil

import pytest
from short_runs import SMALL

from experiments.comparing.compare import compare
from experiments.launching.statuses import FAILED, Failure, explained
from experiments.running import recording
from experiments.running.locking import LOCK, locked
from experiments.running.metrics import METRICS, SUMMARY, read_metrics, read_summary
from experiments.running.recording import FLAGS, Recorder, check_same_run
from experiments.running.tensorboard import Board
from jaxlocal import ConfigurationError

LINE = {
    **{"step": 3, "round": 1, "local_steps": 2, "bits_workers": 64, "bits_hubs": 0},
    **{"wall_seconds": 1.5, "learning_rate": 0.1, "train_loss": 0.5, "eval_loss": None},
    **{"eval_accuracy": None, "consensus_distance": 0.25},
}


def line(**changes):
    return json.dumps(LINE | changes).encode() + b"\n"


@pytest.mark.parametrize(
    "torn",
    [
        b"",
        b'{"step"',
        '{"step": "½'.encode()[:-1],
        b"\0" * 500,
        b"[" * 100_000,
        line()[:-1],
        b"\xff",
    ],
    ids=["none", "json", "half a character", "NUL", "brackets", "newline", "binary"],
)
def test_an_incomplete_last_line_is_left_out(torn, tmp_path):
    (tmp_path / METRICS).write_bytes(line(step=3) + line(step=7) + torn)
    assert [measured["step"] for measured in read_metrics(tmp_path)] == [3, 7]


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        (b"{\n", "its line 2 is not a measurement"),
        (b"[" * 100_000 + b"\n", "its line 2 is not a measurement"),
        (b"\0\0\0\n", "its line 2 is not a measurement"),
        (b"\xc2\n", "its line 2 is not a measurement"),
        (b"\n", "its line 2 is not a measurement"),
        (b"x" * (1 << 21), "its line 2 is not a measurement"),
        (b"9" * 5000 + b"\n", "its line 2 is not a measurement"),
        (b'{"step": 4}\n', "its line 2 is not a measurement"),
        (line(step="4"), "its line 2 is not a measurement"),
        (line(step=True), "its line 2 is not a measurement"),
        (line(step=4.0), "its line 2 is not a measurement"),
        (line(step=-1), "its line 2 is not a measurement"),
        (line(step=4, bits_hubs=10**400), "its line 2 is not a measurement"),
        (line(step=4, time_slots="9"), "its line 2 is not a measurement"),
        (line(step=4, train_loss="low"), "its line 2 is not a measurement"),
        (line(step=4, wall_seconds=None), "its line 2 is not a measurement"),
        (line(step=3), "its line 2 is of step 3, and the one before it of step 3"),
        (line(step=2), "its line 2 is of step 2, and the one before it of step 3"),
    ],
)
def test_another_damage_of_the_metrics_is_one_sentence(damaged, words, tmp_path):
    (tmp_path / METRICS).write_bytes(line() + damaged + line(step=9))
    for read in (read_metrics, lambda folder: compare([folder], folder / "a.png", None)):
        with pytest.raises(ConfigurationError) as error:
            read(tmp_path)
        assert str(error.value) == f"{tmp_path / METRICS} is damaged: {words}"


def test_metrics_that_are_no_file_are_refused(tmp_path):
    (tmp_path / METRICS).mkdir()
    with pytest.raises(ConfigurationError, match="metrics.jsonl is not a file"):
        read_metrics(tmp_path)
    (tmp_path / METRICS).rmdir()
    os.mkfifo(tmp_path / METRICS)
    with pytest.raises(ConfigurationError, match="metrics.jsonl is not a file"):
        read_metrics(tmp_path)


DAMAGES = [
    b"",
    b"{",
    b"[" * 100_000,
    b"\xff\xfe",
    b"\0" * 9,
    b"[]",
    b'{"ended": 3}',
    b"x" * (1 << 21),
]


@pytest.mark.parametrize("damaged", DAMAGES)
def test_a_damaged_summary_is_as_none(damaged, tmp_path):
    assert read_summary(tmp_path) is None
    (tmp_path / SUMMARY).write_bytes(damaged)
    assert read_summary(tmp_path) is None


@pytest.mark.parametrize("damaged", DAMAGES)
def test_damaged_flags_are_refused_in_a_short_sentence(damaged, tmp_path):
    (tmp_path / FLAGS).write_bytes(damaged)
    with pytest.raises(ConfigurationError) as error:
        check_same_run(tmp_path, SMALL)
    assert str(error.value).isprintable() and len(str(error.value)) < 700


def test_flags_that_are_no_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / FLAGS)
    with pytest.raises(ConfigurationError, match="flags.txt is not a file"):
        check_same_run(tmp_path, SMALL)


@pytest.fixture
def recorder(tmp_path):
    recorder = Recorder(tmp_path, SMALL, lambda: None)
    recorder.begin(0)
    return recorder


REMOVALS = {
    "the folder": shutil.rmtree,
    "the folder, which has another name": lambda folder: folder.rename(folder.with_name("other")),
    "the lock": lambda folder: (folder / LOCK).unlink(),
}


@pytest.mark.parametrize("again", [False, True], ids=["alone", "with another run"])
@pytest.mark.parametrize("removed", REMOVALS)
def test_a_run_does_not_write_where_another_one_may_be(tmp_path, removed, again):
    folder = tmp_path / "run"
    with locked(folder) as check_held, contextlib.ExitStack() as second:
        recorder = Recorder(folder, SMALL, check_held)
        recorder.begin(0)
        recorder.add(LINE)
        REMOVALS[removed](folder)
        if again:
            second.enter_context(locked(folder))
        before = sorted(folder.rglob("*"))
        writes = (
            lambda: recorder.add(LINE),
            recorder.flush,
            lambda: recorder.finish({"ended": ""}),
        )
        for write in writes:
            with pytest.raises(Failure, match="run or the file 'lock' in it was removed or replac"):
                write()
        assert sorted(folder.rglob("*")) == before


def test_a_file_of_the_user_in_the_place_of_the_lock_is_kept(tmp_path):
    (tmp_path / "mine").write_text("process 7 on paper")
    (tmp_path / LOCK).symlink_to("mine")
    with pytest.raises(ConfigurationError, match="cannot be written: Too many levels of symb"):
        locked(tmp_path).__enter__()
    assert (tmp_path / "mine").read_text() == "process 7 on paper"
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).write_text("combination: 12-34")
    with pytest.raises(ConfigurationError, match="holds a file 'lock' that is not of this program"):
        locked(tmp_path).__enter__()
    assert (tmp_path / LOCK).read_text() == "combination: 12-34"
    for torn in (b"", b"\0" * 30, b"process 7 on"):
        (tmp_path / LOCK).write_bytes(torn)
        with locked(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def check_names(path, call):
    with pytest.raises(Failure) as error:
        call()
    sentence = f"{path} could not be written: No space left on device"
    assert explained(error.value) == (sentence, FAILED)


def test_a_full_disk_names_the_metrics(recorder):
    recorder._file.close()
    recorder._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    recorder._file = io.TextIOWrapper(recorder._file, write_through=True)
    check_names(recorder.folder / METRICS, lambda: recorder.add(LINE))


def test_a_full_disk_names_the_other_files(recorder, monkeypatch):
    folder = recorder.folder
    monkeypatch.setattr(Board, "add", full)
    check_names(folder / "tensorboard", lambda: recorder.add(LINE))
    monkeypatch.setattr(recording.os, "replace", full)
    check_names(folder / SUMMARY, lambda: recorder.finish({"ended": "finished"}))
    check_names(folder / FLAGS, lambda: recording.claim(folder, SMALL))
