"""Runs on several processes: all end when one does, and the same commands resume the run."""

import dataclasses
import shutil
import signal
import sys
import time

import pytest
from processes import free_port, joined, listening, processes
from short_runs import SMALL, run, saved_steps, without_time

from experiments.running.recording import read_metrics

pytestmark = pytest.mark.slow

LINKED = """
import time
from experiments.launching import link, meeting, secret
link.BEAT, link.SILENCE = 0.5, 4.0
place = link.Place("127.0.0.1", {port}, 3, NUMBER)
meeting.meet(place, [], secret.Secret(b"of this run", "FILE"), 60.0)
print("met", flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize(
    ("victim", "how", "what"),
    [
        (1, signal.SIGKILL, "process 1 of 3 has ended"),
        (2, signal.SIGSTOP, "process 2 of 3 has sent nothing for 4 s"),
        (0, signal.SIGSTOP, "process 0 of 3 has sent nothing for 4 s"),
    ],
)
def test_a_process_that_dies_or_freezes_ends_the_others(victim, how, what):
    with processes(3, "-c", LINKED.format(port=free_port())) as all_of_them:
        for one in all_of_them:
            assert one.stdout.readline() == "met\n"
        all_of_them[victim].send_signal(how)
        for one in all_of_them:
            if one is not all_of_them[victim]:
                _, error = one.communicate(timeout=60)
                assert one.returncode == 1
                assert error == (
                    f"error: {what}; the same commands resume from the last checkpoint\n"
                )


WAITING = """
from experiments.building.config import Config
from experiments.launching import joining
address = "127.0.0.1:{port}"
config = Config(coordinator_address=address, process_count=2, process_id=NUMBER, workdir="{folder}")
with joining.joined(config, joining.find_group(config)):
    print("joined", flush=True)
    input()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ports of a process in /proc")
def test_a_run_listens_only_where_gloo_does(tmp_path):
    port = free_port()
    with processes(2, "-c", WAITING.format(port=port, folder=tmp_path)) as both:
        for one in both:
            assert one.stdout.readline() == "joined\n"
        ports = [listening(one) for one in both]
        for one in both:
            print(file=one.stdin, flush=True)
        for one in both:
            _, error = one.communicate(timeout=60)
            assert one.returncode == 0, error
    assert [len(found) for found in ports] == [1, 1] and port not in ports[0] + ports[1]


RUN = dataclasses.replace(SMALL, local_steps=4, steps=200, eval_every=50, checkpoint_every=50)


def binary(folder, *more):
    return joined(2, folder, [*RUN.flag_lines(), *more])


def test_a_killed_run_resumes_from_its_checkpoint(tmp_path):
    folder = tmp_path / "joined"
    with binary(folder) as (first, second):
        until = time.monotonic() + 120
        while not saved_steps(folder) and time.monotonic() < until:
            time.sleep(0.02)
        first.kill()  # process 0, with JAX's coordination service
        _, error = second.communicate(timeout=60)
    assert second.returncode == 1
    assert error.startswith("error: process 0 of 2 has ended") and error.count("\n") == 1, error
    assert saved_steps(folder) and saved_steps(folder)[-1] < 200, "killed too late"
    with binary(folder) as (first, second):
        (out, first_error), (nothing, second_error) = (
            one.communicate(timeout=120) for one in (first, second)
        )
    assert (first.returncode, second.returncode) == (0, 0), first_error + second_error
    assert "resuming from step" in out and "Gloo" not in out and not nothing
    status, whole = run(RUN, tmp_path / "alone")
    lines = without_time(read_metrics(folder))
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
                "error: the processes of a run need the same flags, versions and settings: "
                "process 0 has --seed=0, process 1 --seed=1\n"
            )
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".secret"]
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file at which process 0 alone looks")
    with binary(tmp_path / "run") as both:
        for one in both:
            _, error = one.communicate(timeout=100)
            assert one.returncode == 2
            assert error == f"error: the workdir {tmp_path / 'run'} is a file\n"
