"""Strangers at the port of process 0, and processes that come twice, late or again."""

import contextlib
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import strangers
from processes import free_port

from experiments.launching.channel import Channel
from experiments.launching.door import Door, listed, listening
from experiments.launching.link import Place
from experiments.launching.meeting import meet
from experiments.launching.secret import Secret
from jaxlocal import ConfigurationError

SECRET = Secret(b"of this run", "FILE")
HINT = (
    "all processes need the same JAXLOCAL_SECRET, or none of them and one --workdir that they all "
    "share"
)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(64) as pool:
        yield pool


def come(pool, port, number, patience=20.0, secret=SECRET, count=2):
    """A process that joins in a thread; its result is the sentence of the error, or ""."""

    def meeting():
        try:
            meet(Place("127.0.0.1", port, count, number), ["--seed=0"], secret, patience)
            return ""
        except ConfigurationError as error:
            return str(error).replace(str(port), "PORT")

    return pool.submit(meeting)


def until_it_listens(port):
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)


def test_strangers_before_the_start_cost_the_processes_nothing(pool):
    port = free_port()
    first = come(pool, port, 0)
    until_it_listens(port)
    for stranger in strangers.STRANGERS.values():
        pool.submit(stranger, ("127.0.0.1", port))
    time.sleep(0.3)
    assert not first.done()
    assert [come(pool, port, 1).result(20), first.result(20)] == ["", ""]


def test_strangers_alone_start_nothing_and_are_reported(pool):
    port = free_port()
    first = come(pool, port, 0, patience=0.6)
    until_it_listens(port)
    for stranger in strangers.BEGINNINGS:
        pool.submit(strangers.STRANGERS[stranger], ("127.0.0.1", port))
    pattern = (
        "process 1 of 2 has not connected to 127.0.0.1:PORT within 1 s; connections that did not "
        rf"know the secret from FILE: \d+, the last from 127.0.0.1; {HINT}"
    )
    assert re.fullmatch(pattern, first.result(20))


def test_who_knows_the_flags_and_not_the_secret_does_not_join(pool):
    port = free_port()
    first = come(pool, port, 0, patience=0.6)
    other = come(pool, port, 1, patience=0.6, secret=Secret(b"another", "JAXLOCAL_SECRET"))
    assert first.result(20).startswith(
        "process 1 of 2 has not connected to 127.0.0.1:PORT within 1 s; connections that did not"
    )
    assert other.result(20).startswith(
        "the coordinator, process 0 at 127.0.0.1:PORT, has not answered process 1 of 2 for 1 s: "
    )


def test_another_secret_is_named_while_process_0_waits(pool):
    port = free_port()
    first = come(pool, port, 0, patience=1)
    other = come(pool, port, 1, patience=0.5, secret=Secret(b"another", "JAXLOCAL_SECRET"))
    assert other.result(20).endswith(f"its secret is not that from JAXLOCAL_SECRET; {HINT}")
    assert first.result(20)


def test_a_recorded_connection_opens_nothing(pool):
    port = free_port()
    first = come(pool, port, 0)
    until_it_listens(port)
    with strangers.recorded(("127.0.0.1", port)) as (between, to, back):
        second = come(pool, between, 1)
        assert [first.result(20), second.result(20)] == ["", ""]
    first, until = come(pool, port, 0, patience=0.6), time.monotonic() + 0.3
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            strangers.sending(bytes(to))(("127.0.0.1", port))
    assert "connections that did not know the secret" in first.result(20)
    # Nor does a stranger who answers as process 0 has answered before.
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connection.sendall(bytes(back))
                    kept.append(connection)

        kept = []
        pool.submit(pretend)
        error = come(pool, listener.getsockname()[1], 1, patience=0.5).result(20)
        strangers.hasty(listener.getsockname())
        listener.shutdown(socket.SHUT_RDWR)
    assert error.endswith("what it sends is no message of this run")


def enter(port, number=1):
    """A process that has connected and waits for the others."""
    connection = socket.create_connection(("127.0.0.1", port))
    channel = Channel(connection, SECRET.value, True, time.monotonic() + 10)
    channel.send({"number": number, "flags": ["--seed=0"]})
    assert channel.receive(time.monotonic() + 10) == {}
    return channel


def test_a_process_that_ends_while_others_wait_may_come_again(pool):
    port = free_port()
    first = come(pool, port, 0, count=3)
    until_it_listens(port)
    enter(port).close()
    rest = [come(pool, port, number, count=3) for number in (1, 2)]
    assert [one.result(20) for one in [first, *rest]] == ["", "", ""]


def test_a_process_that_ends_while_others_wait_is_missing(pool):
    port = free_port()
    first = come(pool, port, 0, count=3, patience=0.6)
    until_it_listens(port)
    enter(port).close()
    second = come(pool, port, 2, count=3)
    sentence = "process 1 of 3 has not connected to 127.0.0.1:PORT within 1 s (or has ended again)"
    for one in (first, second):
        assert one.result(20).startswith(sentence)


def test_process_0_may_start_again_while_the_others_wait(pool):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        second = come(pool, port, 1)
        connection, _ = listener.accept()
        channel = Channel(connection, SECRET.value, False, time.monotonic() + 10)
        channel.receive(time.monotonic() + 10)
        channel.send({})
    channel.close()
    assert [come(pool, port, 0).result(20), second.result(20)] == ["", ""]


def test_a_process_that_comes_late_is_not_answered(pool):
    port = free_port()
    assert not any(one.result(20) for one in [come(pool, port, 0), come(pool, port, 1)])
    assert "has not answered process 1 of 2" in come(pool, port, 1, patience=0.3).result(20)


def test_a_silent_coordinator_ends_the_wait(pool):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        error = come(pool, listener.getsockname()[1], 1, patience=0.3).result(20)
        assert error.endswith("has not answered process 1 of 2 for 0 s: it is silent")


def test_a_process_outside_of_the_run_is_refused(pool):
    port = free_port()
    both = come(pool, port, 0), come(pool, port, 5)
    assert {one.result(20) for one in both} == {"a process with --process_id=5 joins a run of 2"}


def test_many_missing_processes_are_counted(pool):
    assert listed(list(range(1, 11)), 99_998) == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 99988 more"
    error = come(pool, free_port(), 0, patience=0.1, count=10**9).result(20)
    assert error.startswith(
        "processes 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 999999989 more of 10000000"
    )


def test_connections_beyond_a_number_displace_each_other(monkeypatch, pool):
    monkeypatch.setattr("experiments.launching.door.MOST_UNKNOWN", 8)
    port = free_port()
    first = come(pool, port, 0)
    until_it_listens(port)
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    time.sleep(0.2)
    greeted = lambda: sum("_greet" in thread.name for thread in threading.enumerate())
    until = time.monotonic() + 20
    while greeted() > 9 and time.monotonic() < until:
        time.sleep(0.05)
    assert greeted() <= 9
    assert [come(pool, port, 1).result(20), first.result(20)] == ["", ""]
    for one in silent:
        one.close()


class SlowSet(set):
    """A set from which nothing goes at once."""

    def discard(self, one):
        time.sleep(0.1)
        super().discard(one)


def test_a_process_is_not_dropped_while_it_becomes_known():
    with listening("127.0.0.1", 0) as listener, ThreadPoolExecutor(1) as other:
        port = listener.getsockname()[1]
        door = Door(listener, SECRET, time.monotonic() + 20)
        door._unknown = SlowSet()
        entering = other.submit(enter, port)
        (process,) = door.wait_for(1)
        assert not process.channel.ended
        process.channel.close()
        entering.result().close()
