"""Messages of processes that share a secret: what is refused, and how a run gets its secret."""

import contextlib
import errno
import os
import re
import socket
import stat
import threading
import time

import pytest

from experiments.launching.channel import LONGEST, Channel, Nonsense
from experiments.launching.secret import shared_secret
from jaxlocal import ConfigurationError


@contextlib.contextmanager
def two(first=b"the secret", second=b"the secret"):
    """The two sides of a connection, each with its secret."""
    made, until = [], time.monotonic() + 10
    left, right = socket.socketpair()
    make = lambda: made.append(Channel(left, first, True, until))
    thread = threading.Thread(target=make)
    thread.start()
    other = Channel(right, second, False, until)
    thread.join()
    with contextlib.closing(made[0]), contextlib.closing(other):
        yield made[0], other


def soon():
    return time.monotonic() + 0.2


def test_messages_arrive_in_both_directions_and_in_order():
    with two() as sides:
        for sender, receiver in [sides, sides[::-1]]:
            messages = [{"a": [1, "ü\n"]}, {}, {"long": "x" * 100_000}]
            for message in messages:
                sender.send(message)
            assert [receiver.receive(soon()) for _ in messages] == messages


def test_another_secret_is_noticed():
    with two(second=b"another secret") as (first, second):
        first.send({})
        second.send({})
        for side in (first, second):
            with pytest.raises(Nonsense):
                side.receive(soon())


def lines_of(sender, receiver, *messages):
    """The bytes of some messages, taken from the connection."""
    for message in messages:
        sender.send(message)
    return [receiver._line(soon()) + b"\n" for _ in messages]


@pytest.mark.parametrize("how", ["changed", "repeated", "swapped", "turned round"])
def test_a_message_that_another_has_sent_is_noticed(how):
    with two() as (first, second):
        one, next_one = lines_of(first, second, {"status": 1}, {"status": 2})
        sent = {
            "changed": one.replace(b"1}", b"0}"),
            "repeated": one + one,
            "swapped": next_one + one,
            "turned round": one,
        }[how]
        receiver = first if how == "turned round" else second
        (second if receiver is first else first)._write(sent)
        if how == "repeated":
            assert receiver.receive(soon()) == {"status": 1}
        with pytest.raises(Nonsense):
            receiver.receive(soon())


@pytest.mark.parametrize("body", [b"5", b"null", b"[1,2]", b"[" * 100_000, b"", b"\xff", b"{"])
def test_what_is_signed_and_no_object_is_refused(body):
    with two() as (first, second):
        first._write(first._signature(True, 0, body) + b" " + body + b"\n")
        with pytest.raises(Nonsense):
            second.receive(soon())


@pytest.mark.parametrize("data", [b"x\n", b"x" * 10 + b"\n", b"\n", b"x" * (LONGEST + 1)])
def test_what_does_not_begin_as_a_process_is_refused(data):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        threading.Thread(target=theirs.sendall, args=(data,), daemon=True).start()
        with pytest.raises(Nonsense):
            Channel(ours, b"the secret", False, soon())


def test_slow_bytes_do_not_move_the_deadline():
    ours, theirs = socket.socketpair()

    def drip():
        with contextlib.suppress(OSError):
            while True:
                theirs.sendall(b"j")
                time.sleep(0.02)

    with theirs, ours:
        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            Channel(ours, b"the secret", False, soon())
        assert time.monotonic() - began < 10  # a bound on the wait, not on speed


def test_the_first_process_writes_the_secret_that_all_read(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXLOCAL_SECRET", raising=False)
    folder, found = tmp_path / "new" / "run", []
    find = lambda: found.append(shared_secret(folder, 10))
    threads = [threading.Thread(target=find) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    file = folder / ".secret"
    assert found[0].source == str(file) and found[0].value == file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert shared_secret(tmp_path / "other", 10).value != found[0].value


def test_a_secret_of_the_environment_needs_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLOCAL_SECRET", "sixteen letters!")
    assert shared_secret(tmp_path / "run", 1) == (b"sixteen letters!", "JAXLOCAL_SECRET")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("JAXLOCAL_SECRET", "short")
    with pytest.raises(ConfigurationError, match="at least 16 characters, got 5$"):
        shared_secret(tmp_path, 1)


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        ("x" * 64, "it holds something else; delete it; all processes need the same JAXLOCAL"),
        ("", "another process has not written it; delete it; all processes"),
        (None, "Is a directory; all processes need"),
    ],
)
def test_a_file_that_holds_no_secret_is_reported(tmp_path, monkeypatch, held, sentence):
    monkeypatch.delenv("JAXLOCAL_SECRET", raising=False)
    file = tmp_path / ".secret"
    file.mkdir() if held is None else file.write_text(held)
    with pytest.raises(ConfigurationError, match=re.escape(f"{file}: {sentence}")):
        shared_secret(tmp_path, 0.1)


def test_a_full_disk_leaves_no_empty_secret(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXLOCAL_SECRET", raising=False)

    def full(count):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("secrets.token_hex", full)
    with pytest.raises(ConfigurationError, match="No space left on device; all processes"):
        shared_secret(tmp_path, 0.1)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("path", ["a file", "a file/run", "a\0b"])
def test_a_folder_that_cannot_hold_a_secret_is_reported(tmp_path, monkeypatch, path):
    monkeypatch.delenv("JAXLOCAL_SECRET", raising=False)
    (tmp_path / "a file").touch()
    sentence = "is a file$" if path == "a file" else "Not a directory; all|null byte; all"
    with pytest.raises(ConfigurationError, match=sentence):
        shared_secret(tmp_path / path, 0.1)
    assert os.listdir(tmp_path) == ["a file"]
