"""Runs on several processes: who may join, who is waited for, and how all end when one does."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from short_runs import run, without_time

from experiments.building.config import Config
from experiments.launching.joining import find_group
from experiments.launching.link import Place, meet
from experiments.running.recording import CHECKPOINTS, read_metrics
from jaxlocal import ConfigurationError

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"process_count": 2},
            "--process_count=2 was given without --coordinator_address and --process_id",
        ),
        (
            {"coordinator_address": "here", "process_count": 2, "process_id": 0},
            "--coordinator_address must be HOST:PORT, got 'here'",
        ),
        (
            {"coordinator_address": "here:99999", "process_count": 2, "process_id": 0},
            "--coordinator_address must be HOST:PORT, got 'here:99999'",
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
def test_flags_that_contradict_are_told(flags, sentence):
    with pytest.raises(ConfigurationError, match=f"^{re.escape(sentence)}$"):
        find_group(Config(**flags))


def test_the_processes_are_found_by_hand_or_by_the_cluster(monkeypatch):
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


def meeting(count, *flags, patience=20.0, host="127.0.0.1"):
    """What each of the processes is told that come, one thread each: flags by process number."""
    port, told = free_port(), {}

    def come(at, number, lines):
        try:
            meet(Place(host, port, count, number), lines, patience)
        except ConfigurationError as error:
            told[at] = str(error)

    threads = [threading.Thread(target=come, args=(n, *f)) for n, f in enumerate(flags)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [re.sub(rf"\b{port}\b", "PORT", told.get(at, "")) for at in range(len(flags))]


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        (["--seed=1", "--lr=2"], "process 0 has --seed=0, process 2 --seed=1"),
        (["--lr=2"], "process 0 has --seed=0, process 2 no --seed"),
        (
            ["--seed=0", "--lr=2", "--period=swap"],
            "process 0 has no --period, process 2 --period=swap",
        ),
    ],
)
def test_all_are_told_of_flags_that_differ(theirs, told):
    ours = ["--seed=0", "--lr=2"]
    sentence = f"the processes of a run need the same flags and versions: {told}"
    assert meeting(3, (0, ours), (1, ours), (2, theirs)) == [sentence] * 3


def test_flags_that_differ_are_told_before_who_has_not_come():
    # Started as the last of three, where process 0 waits for one.
    told = "process 0 has --process_count=2, process 2 --process_count=3"
    sentence = f"the processes of a run need the same flags and versions: {told}"
    both = meeting(2, (0, ["--process_count=2"]), (2, ["--process_count=3"]))
    assert both == [sentence] * 2


@pytest.mark.parametrize("host", ["localhost", "::1"])
def test_processes_meet_on_either_loopback(host):
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("a machine without IPv6")
    assert meeting(2, (0, []), (1, []), host=host) == ["", ""]


def test_all_are_told_of_who_does_not_come_or_comes_twice():
    late = "processes 2 and 3 of 4 have not connected to 127.0.0.1:PORT within 1 s"
    assert meeting(4, (0, []), (1, []), patience=1) == [late] * 2
    assert meeting(3, (0, []), (1, []), (1, [])) == ["several processes have --process_id=1"] * 3


def test_a_coordinator_that_does_not_answer_is_waited_for_so_long():
    sentence = (
        "the coordinator, process 0 at 127.0.0.1:PORT, has not answered process 1 of 2 for 1 s"
    )
    began = time.monotonic()
    assert meeting(2, (1, []), patience=1) == [sentence]
    assert time.monotonic() - began < 30  # a bound on the wait, not on speed


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"cannot listen at 127.0.0.1:{port}: Address"):
            meet(Place("127.0.0.1", port, 2, 0), [], 5)


HASTY = """
import time
from experiments.launching.link import Place, meet
meet(Place("127.0.0.1", {port}, 2, 1), [], 60.0)
time.sleep(60)
"""


def test_what_is_said_together_is_heard_together():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        processes(1, "-c", HASTY.format(port=listener.getsockname()[1])) as (one,),
    ):
        listener.settimeout(60)
        peer, _ = listener.accept()
        with peer:
            peer.recv(1 << 16)
            peer.sendall(b'{"port": 1}\n{"sentence": "the disk is full", "status": 1}\n')
            _, error = one.communicate(timeout=60)
    assert (one.returncode, error) == (1, "error: the disk is full\n")


def test_a_coordinator_that_goes_is_not_said_to_be_silent():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(ConfigurationError, match="has ended before it answered process 1 of 2"):
            meet(Place("127.0.0.1", port, 2, 1), [], 60.0)


@contextlib.contextmanager
def processes(count, *arguments):
    """Programs of ours, each with its number; nothing of them stays behind."""
    with contextlib.ExitStack() as stack:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = []
        for number in range(count):
            command = [argument.replace("NUMBER", str(number)) for argument in arguments]
            one = subprocess.Popen([sys.executable, *command], cwd=ROOT, **pipes)
            stack.callback(one.communicate)
            stack.callback(one.kill)
            started.append(one)
        yield started


LINKED = """
import time
from experiments.launching import link
link.BEAT, link.SILENCE = 0.5, 4.0
link.meet(link.Place("127.0.0.1", {port}, 3, NUMBER), [], 60.0)
print("met", flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize(
    ("victim", "how", "told"),
    [
        (1, signal.SIGKILL, "process 1 of 3 has ended"),
        (2, signal.SIGSTOP, "process 2 of 3 has sent nothing for 4 s"),
        (0, signal.SIGSTOP, "process 0 of 3 has sent nothing for 4 s"),
    ],
)
def test_a_process_that_dies_or_freezes_ends_the_others(victim, how, told):
    with processes(3, "-c", LINKED.format(port=free_port())) as all_of_them:
        for one in all_of_them:
            assert one.stdout.readline() == "met\n"
        all_of_them[victim].send_signal(how)
        for one in all_of_them:
            if one is not all_of_them[victim]:
                _, error = one.communicate(timeout=60)
                assert one.returncode == 1
                assert error == (
                    f"error: {told}; the same commands resume from the last checkpoint\n"
                )


RUN = Config(
    dataset="least_squares",
    model="linear",
    workers=4,
    batch_size=8,
    local_steps=4,
    steps=200,
    momentum=0.0,
    eval_every=50,
    checkpoint_every=50,
)


def binary(folder, *more):
    joined = (f"--coordinator_address=127.0.0.1:{free_port()}", "--process_count=2")
    own = (f"--workdir={folder}", "--process_id=NUMBER")
    return processes(2, "-m", "experiments.train", *RUN.flag_lines(), *joined, *own, *more)


def saved(folder):
    names = os.listdir(folder / CHECKPOINTS) if (folder / CHECKPOINTS).exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path):
    joined = tmp_path / "joined"
    with binary(joined) as (first, second):
        until = time.monotonic() + 120
        while not saved(joined) and time.monotonic() < until:
            time.sleep(0.02)
        first.kill()  # process 0, with JAX's coordination service
        _, error = second.communicate(timeout=60)
    assert second.returncode == 1
    assert error.startswith("error: process 0 of 2 has ended") and error.count("\n") == 1, error
    assert saved(joined) and saved(joined)[-1] < 200, "killed too late"
    with binary(joined) as (first, second):
        (out, first_error), (nothing, second_error) = (
            one.communicate(timeout=120) for one in (first, second)
        )
    assert (first.returncode, second.returncode) == (0, 0), first_error + second_error
    assert "resuming from step" in out and "Gloo" not in out and not nothing
    status, whole = run(RUN, tmp_path / "alone")
    lines = without_time(read_metrics(joined))
    assert status == 0 and [line["step"] for line in lines] == [0, 50, 100, 150, 200]
    for line, expected in zip(lines, without_time(whole), strict=True):
        assert line.pop("eval_accuracy") is expected.pop("eval_accuracy") is None
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_mistake_in_one_process_ends_all_with_one_sentence(tmp_path):
    with binary(tmp_path / "run", "--seed=NUMBER") as both:
        for one in both:
            out, error = one.communicate(timeout=100)
            assert one.returncode == 2 and not out
            assert error == (
                "error: the processes of a run need the same flags and versions: process 0 has "
                "--seed=0, process 1 --seed=1\n"
            )
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").write_text("what process 0 alone looks at")
    with binary(tmp_path / "run") as both:
        for one in both:
            _, error = one.communicate(timeout=100)
            assert one.returncode == 2
            assert error == f"error: the workdir {tmp_path / 'run'} is a file\n"
