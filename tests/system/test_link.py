"""What a process of a run does at messages of another one, whatever they say."""

import os
import socket
import threading
import time

import jax
import pytest
from jax.experimental import multihost_utils

from experiments.launching.channel import Channel
from experiments.launching.exchange import exchange
from experiments.launching.link import Link, Place
from experiments.launching.statuses import Failure


@pytest.fixture
def ended(monkeypatch, capsys):
    """Waits for the end of this process; returns the exit status and the error."""
    statuses, over = [], threading.Event()

    def exit(status):
        statuses.append(status)
        over.set()
        threading.Event().wait()  # nothing runs after an exit

    def wait():
        assert over.wait(10)
        return statuses[0], capsys.readouterr().err

    monkeypatch.setattr(os, "_exit", exit)
    return wait


@pytest.fixture
def other():
    """The channel of process 1, which process 0 listens to."""
    left, right = socket.socketpair()
    until, made = time.monotonic() + 10, []
    make = lambda: made.append(Channel(left, b"the secret", True, until))
    thread = threading.Thread(target=make)
    thread.start()
    ours = Channel(right, b"the secret", False, until)
    thread.join()
    Link(Place("here", 1, 2, 0), {1: ours})
    yield made[0]
    made[0].close()


@pytest.mark.parametrize(("status", "ours"), [(0, 1), (-1, 1), (256, 1), (2, 2), (143, 143)])
def test_a_process_that_fails_ends_the_others_but_never_with_success(other, ended, status, ours):
    other.send({})
    other.send({"sentence": "the disk\nis full", "status": status})
    assert ended() == (ours, "error: the disk is full\n")


RESUMING = "the same commands resume from the last checkpoint\n"


@pytest.mark.parametrize(
    "message",
    [{"sentence": 5, "status": 1}, {"sentence": "x", "status": "0"}, {"sentence": "x"}]
    + [{"left": 0}, {"left": [1]}, {"data": 5}, {"status": 0}, {"joined": None}],
)
def test_a_message_of_wrong_types_ends_with_a_sentence(other, ended, message):
    other.send(message)
    sentence = "process 1 of 2 has sent what is no message of this version"
    assert ended() == (1, f"error: {sentence}; {RESUMING}")


@pytest.mark.parametrize("data", [b"5\n", b"null\n", b"[" * 200_000, b"\xff\xfe\n", b"00 {}\n"])
def test_bytes_that_are_no_message_end_with_a_sentence(other, ended, data):
    threading.Thread(target=other._write, args=(data,), daemon=True).start()
    status, error = ended()
    assert status == 1 and error.startswith("error: process 1 of 2 has sent what is no message")


def test_a_process_that_closes_without_leaving_has_ended(other, ended):
    other.close()
    assert ended() == (1, f"error: process 1 of 2 has ended; {RESUMING}")


HINT = "each host must be reached by the others, and by nobody else, at all ports of the address"


def test_processes_that_cannot_exchange_arrays_end_in_one_sentence(monkeypatch):
    def refused(name):
        raise jax.errors.JaxRuntimeError("Gloo: Connection refused\nin a stack of calls")

    monkeypatch.setattr(multihost_utils, "sync_global_devices", refused)
    sentence = f"cannot exchange arrays; {HINT} of its name; JAX says: Gloo: Connection refused$"
    with pytest.raises(Failure, match=sentence):
        exchange(Link(Place("here", 1, 2, 0), {}), 20)


def test_processes_that_wait_for_arrays_without_end_are_ended(monkeypatch, ended):
    over = threading.Event()
    monkeypatch.setattr(multihost_utils, "sync_global_devices", lambda name: over.wait(10))
    link = Link(Place("here", 1, 2, 0), {})
    threading.Thread(target=exchange, args=(link, 0.1), daemon=True).start()
    status, error = ended()
    over.set()
    assert status == 1 and error.startswith(
        f"error: the processes have not exchanged an array within 0 s; {HINT}"
    )
