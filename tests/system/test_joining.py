"""How the processes of a run find each other: their flags, who is waited for, and which errors all
of them report. `test_joined_runs.py` has real runs."""

import contextlib
import dataclasses
import os
import re
import socket
import sys
import threading
import time
from types import SimpleNamespace

import jax
import pytest
from processes import free_port

from experiments.building.config import Config
from experiments.launching import meeting as meeting_module
from experiments.launching.joining import _shared_lines, find_group
from experiments.launching.link import Place
from experiments.launching.meeting import meet
from experiments.launching.sameness import SETTINGS, check_devices, versions_and_settings
from experiments.launching.secret import Secret
from jaxlocal import ConfigurationError


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"process_count": 2},
            "--process_count=2 was given without --coordinator_address and --process_id",
        ),
        (
            {"coordinator_address": "here:1", "process_count": 2, "process_id": 2},
            "--process_id must be from 0 to 1 with --process_count=2, got 2",
        ),
        (
            {"coordinator_address": "here:1", "process_count": 0, "process_id": 0},
            "--process_count must be at least 1, got 0",
        ),
        (
            {"distributed": True, "process_id": 1},
            "--distributed asks the cluster for the processes, and --process_id=1 was given too",
        ),
    ],
)
def test_flags_that_contradict_are_refused(flags, sentence):
    with pytest.raises(ConfigurationError, match=f"^{re.escape(sentence)}$"):
        find_group(Config(**flags))


@pytest.mark.parametrize(
    "address",
    ["here", "here:", ":81", "here:0", "here:65536", "here:99999", "here:8l", "here:-1", "a b:81"]
    + ["http://here:81", "a..b:81", "x" * 64 + ":81", "here:81:82", "[::1:81", "[]:81", "a\0b:81"],
)
def test_an_address_without_a_host_or_a_port_is_refused(address):
    sentence = (
        f"--coordinator_address must be HOST:PORT with a port from 1 to 65535, got {address!r}"
    )
    with pytest.raises(ConfigurationError, match=f"^{re.escape(sentence)}$"):
        find_group(Config(coordinator_address=address, process_count=2, process_id=0))


@pytest.mark.parametrize(
    ("address", "host"),
    [("[::1]:81", "::1"), ("::1:81", "::1"), ("fe80::1%eth0:81", "fe80::1%eth0"), ("ü:81", "ü")],
)
def test_an_address_has_a_name_or_either_kind_of_number(address, host):
    config = Config(coordinator_address=address, process_count=2, process_id=0)
    assert find_group(config).place == Place(host, 81, 2, 0)


def test_the_processes_are_those_of_the_flags_or_of_the_cluster(monkeypatch):
    by_hand = Config(coordinator_address="[::1]:81", process_count=3, process_id=2)
    assert find_group(by_hand).place == Place("::1", 81, 3, 2)
    assert find_group(Config()) is None
    assert find_group(dataclasses.replace(by_hand, process_count=1, process_id=0)) is None
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "KUBERNETES")):
            monkeypatch.delenv(name)
    with pytest.raises(ConfigurationError, match="--distributed found no cluster"):
        find_group(Config(distributed=True))
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[1-2]", "NTASKS": "4", "PROCID": "3"}
    for name, value in {**slurm, "LOCALID": "1", "STEP_NUM_NODES": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    group = find_group(Config(distributed=True))
    assert group.place[0] == "node1" and group.place[2:] == (4, 3)
    assert group.local_devices == [1]


def test_how_a_run_is_joined_does_not_make_it_another():
    joined = Config(coordinator_address="here:1", process_count=2, process_id=1, distributed=True)
    assert joined.flag_lines() == Config().flag_lines()


SECRET = Secret(b"of this run", "FILE")


def meeting(count, *flags, patience=20.0, host="127.0.0.1", secret=SECRET):
    """The errors of processes that meet, each in a thread with its number and flags."""
    port, errors = free_port(), {}

    def come(at, number, lines, secret=secret):
        try:
            meet(Place(host, port, count, number), lines, secret, patience)
        except ConfigurationError as error:
            errors[at] = str(error)

    threads = [threading.Thread(target=come, args=(n, *f)) for n, f in enumerate(flags)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [re.sub(rf"\b{port}\b", "PORT", errors.get(at, "")) for at in range(len(flags))]


@pytest.mark.parametrize(
    ("theirs", "difference"),
    [
        (["--seed=1", "--lr=2"], "process 0 has --seed=0, process 2 --seed=1"),
        (["--lr=2"], "process 0 has --seed=0, process 2 no --seed"),
        (
            ["--seed=0", "--lr=2", "--period=swap"],
            "process 0 has no --period, process 2 --period=swap",
        ),
    ],
)
def test_all_report_flags_that_differ(theirs, difference):
    ours = ["--seed=0", "--lr=2"]
    sentence = f"the processes of a run need the same flags, versions and settings: {difference}"
    assert meeting(3, (0, ours), (1, ours), (2, theirs)) == [sentence] * 3


def test_flags_that_differ_are_reported_before_who_has_not_come():
    # The other was started as the last of three, and process 0 waits for one.
    difference = "process 0 has --process_count=2, process 2 --process_count=3"
    sentence = f"the processes of a run need the same flags, versions and settings: {difference}"
    both = meeting(2, (0, ["--process_count=2"]), (2, ["--process_count=3"]))
    assert both == [sentence] * 2


@pytest.mark.parametrize("host", ["localhost", "::1"])
def test_processes_meet_on_either_loopback(host):
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("a machine without IPv6")
    assert meeting(2, (0, []), (1, []), host=host) == ["", ""]


def test_all_report_who_does_not_come_or_comes_twice():
    late = "processes 2 and 3 of 4 have not connected to 127.0.0.1:PORT within 1 s"
    assert meeting(4, (0, []), (1, []), patience=1) == [late] * 2
    assert meeting(3, (0, []), (1, []), (1, [])) == ["several processes have --process_id=1"] * 3


UNANSWERED = "the coordinator, process 0 at 127.0.0.1:PORT, has not answered process 1 of 2 for 1 s"


def test_a_coordinator_that_does_not_answer_ends_the_wait():
    began = time.monotonic()
    assert meeting(2, (1, []), patience=1) == [f"{UNANSWERED}: Connection refused"]
    assert time.monotonic() - began < 30  # a bound on the wait, not on speed


def test_a_name_that_nobody_has_is_reported():
    (error,) = meeting(2, (1, []), patience=1, host="nobody.invalid")
    assert re.search("at nobody.invalid:PORT, has not answered .* for 1 s: [A-Z][a-z ]+$", error)


def test_a_port_that_is_taken_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigurationError, match=f"cannot listen at 127.0.0.1:{port}: Address already in use$"
        ):
            meet(Place("127.0.0.1", port, 2, 0), [], SECRET, 5)


def test_settings_of_jax_that_change_numbers_must_be_the_same():
    with jax.enable_x64(True):
        theirs = versions_and_settings()
    ours = versions_and_settings()
    difference = "process 0 has JAX_ENABLE_X64=False, process 1 JAX_ENABLE_X64=True"
    sentence = f"the processes of a run need the same flags, versions and settings: {difference}"
    assert meeting(2, (0, ours), (1, theirs)) == [sentence] * 2
    assert all(name in jax.config.values for name in SETTINGS)


def test_processes_with_other_numbers_of_devices_are_refused(monkeypatch):
    devices = [SimpleNamespace(process_index=number) for number in (0, 1, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(ConfigurationError, match="process 0 has 1, process 1 2; JAX_NUM_CPU_DEV"):
        check_devices()
    devices.append(SimpleNamespace(process_index=0))
    check_devices()


def test_flags_of_any_length_are_compared():
    long = f"--rates={'0.5,' * 100_000}"
    ours, theirs = (_shared_lines(Config(rates=long + end), 2) for end in "12")
    assert meeting(2, (0, ours), (1, ours)) == ["", ""]
    first, second = meeting(2, (0, ours), (1, theirs))
    assert first == second and "process 0 has --rates=" in first and len(first) < 500


@pytest.mark.skipif(sys.platform != "linux", reason="a full backlog is silent on Linux")
def test_a_host_with_a_silent_address_is_reached_at_its_other_one(monkeypatch):
    monkeypatch.setattr(meeting_module, "BEAT", 0.5)
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.2", 0))
        full.listen(0)
        silent = full.getsockname()
        for _ in range(3):  # its backlog is full: no more connections are answered
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(silent)
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        both = [(*kind, silent), (*kind, ("127.0.0.1", silent[1]))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: both)
        first = threading.Thread(
            target=meet, args=(Place("127.0.0.1", silent[1], 2, 0), [], SECRET, 4.0)
        )
        first.start()
        meet(Place("two.addresses", silent[1], 2, 1), [], SECRET, 4.0)
        first.join()
