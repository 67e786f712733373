"""Folders and files that a user names: what cannot be used is told in one sentence, soon."""

import os

import pytest
from binaries import call, one_sentence


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a\0b", "printable"),
        ("a\nb", "printable"),
        ("", "printable"),
        ("gs://bucket/run", "gs://bucket/run is not on this machine"),
        ("~no_such_user/run", "no such home folder"),
        ("x" * 5000, "File name too long"),
        ("FOLDER/file", "is a file"),
        ("FOLDER/file/below", "Not a directory"),
        ("FOLDER/dangling", "is a link to nothing"),
        ("FOLDER/loop", "is a link to nothing"),
        ("/proc/run", "cannot be written"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_sentence(path, words, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.iterdir())
    path = path.replace("FOLDER", str(tmp_path))
    done = call("train", f"--workdir={path}", "--dataset=least_squares", "--model=linear")
    assert done.status == 2 and one_sentence(done.error) and words in done.error, done.error
    assert len(done.error) < 1100 and sorted(tmp_path.iterdir()) == before


def test_other_paths_that_are_not_of_this_machine_are_refused(tmp_path):
    for command in (
        ["train", "--dataset=mnist", "--data_dir=s3://bucket"],
        ["compare", "gs://bucket/run"],
        ["compare", str(tmp_path), "--output=gs://bucket/a.png"],
        ["tune", "--settings=gs://bucket/file", "--learning_rates=0.1"],
        ["prepare", "--dataset=mnist", "--data_dir=gs://bucket"],
        ["benchmark", "--wait_idle=0", "--output=gs://bucket/figures.json"],
    ):
        done = call(*command)
        assert done.status == 2 and one_sentence(done.error), done.error
        assert "is not on this machine" in done.error


def test_the_home_folder_is_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    done = call("train", "--workdir=~/x/../run", "--dataset=least_squares", "--model=linear")
    assert done.status == 2 and f"{tmp_path}/x/../run holds metrics.jsonl but no" in done.error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\0", "is not text: byte 0"),
        (b"--steps=1\n" * 200_000, "is larger than 1048576 bytes"),
        (b"--flagfile=FILE", "includes itself"),
        (b"--flagfile=FOLDER/loop", "includes itself"),
        (b"--flagfile=FOLDER", "is not a file"),
        (b"--flagfile=/dev/zero", "is not a file"),
        (b"--flagfile=FOLDER/pipe", "is not a file"),
        (b"--flagfile=FOLDER/nothing", "No such file"),
        (b"steps", "unexpected argument 'steps'"),
        (b"\0", "unexpected argument"),
    ],
)
@pytest.mark.parametrize("option", ["--flagfile=FILE", "-flagfile=FILE", "--flagfile FILE"])
def test_a_flag_file_that_cannot_be_read_is_one_sentence(content, words, option, tmp_path):
    named = lambda text: text.replace("FILE", str(tmp_path / "file")).replace(
        "FOLDER", str(tmp_path)
    )
    (tmp_path / "file").write_bytes(named(content.decode("latin-1")).encode("latin-1"))
    (tmp_path / "loop").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    done = call("plan", *named(option).split())
    assert done.status == 2 and one_sentence(done.error) and words in done.error, done.error
    assert done.error.count("the flag file") <= 1
