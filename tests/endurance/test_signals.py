"""Ctrl-C and SIGTERM at random moments of a run: it ends soon, in one sentence, with the right exit
status, and the same command resumes it to the same bits."""

import dataclasses
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, free_port, processes
from short_runs import SMALL, saved_steps, without_time

from experiments.running.recording import read_metrics

pytestmark = pytest.mark.slow

RUN = [
    *("--dataset=digits", "--model=mlp", "--workers=2", "--steps=2000", "--local_steps=8"),
    *("--eval_every=200", "--checkpoint_every=100", "--export"),
]
PRESSES, AGAIN = 6, 3  # one in AGAIN of them is followed by a second one
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SENTENCE = re.compile(
    r"error: (interrupted|terminated)( at step \d+; the same command (resumes|starts again).*)?\n"
)
JOINED = dataclasses.replace(
    SMALL, local_steps=4, steps=100_000, eval_every=500, checkpoint_every=5000
)
SLOWEST = 30.0  # seconds from the signal to the end, on a busy machine


@pytest.fixture(autouse=True)
def not_ignored():
    """Processes of this test get SIGINT, also where this one ignores it, as a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(folder):
    command = [sys.executable, "-m", "experiments.train", *RUN, f"--workdir={folder}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def wait_until_python_has_started(process):
    """Wait until the process handles SIGTERM, as it does from the first moment of Python on."""
    while process.poll() is None:
        caught = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
        if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.002)


def to_the_end(folder):
    """Run to the end; returns the seconds, and what must be the same in all such runs."""
    began = time.monotonic()
    process = start(folder)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    model = (folder / "export" / "model.safetensors").read_bytes()
    return time.monotonic() - began, (without_time(read_metrics(folder)), model)


def press(folder, number, moment, again):
    """Run, and send a signal at a moment; returns the exit status."""
    process = start(folder)
    wait_until_python_has_started(process)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        if again is not None:
            time.sleep(again)
            process.send_signal(number)
    began = time.monotonic()
    _, error = process.communicate(timeout=300)
    assert time.monotonic() - began < SLOWEST
    if process.returncode == 0:
        assert not error
    else:
        assert process.returncode == STATUS[number] and SENTENCE.fullmatch(error), error
    return process.returncode


def test_signals_at_random_moments_lose_nothing(times, tmp_path):
    choose = random.Random(times)
    _, whole = to_the_end(tmp_path / "whole")
    seconds, again = to_the_end(tmp_path / "run")  # with the programs of the first
    assert again == whole
    shutil.rmtree(tmp_path / "run")
    statuses = []
    for count in range(PRESSES * times):
        number = (signal.SIGINT, signal.SIGTERM)[count % 2]
        second = choose.uniform(0.0, 0.5) if count % AGAIN == 0 else None
        statuses.append(press(tmp_path / "run", number, choose.uniform(0, seconds), second))
        if statuses[-1] == 0 or count == PRESSES * times - 1:
            assert to_the_end(tmp_path / "run")[1] == whole
            shutil.rmtree(tmp_path / "run")
    print({status: statuses.count(status) for status in sorted(set(statuses))})
    assert 130 in statuses and 143 in statuses


@pytest.mark.parametrize(("number", "who"), [(signal.SIGTERM, (0, 1)), (signal.SIGINT, (1,))])
def test_several_processes_agree_where_they_end(number, who, tmp_path):
    folder, port = tmp_path / "run", free_port()
    joined = (f"--coordinator_address=127.0.0.1:{port}", "--process_count=2")
    own = (f"--workdir={folder}", "--process_id=NUMBER")
    flags = [*JOINED.flag_lines(), *joined, *own]
    with processes(2, "-m", "experiments.train", *flags) as both:
        while not saved_steps(folder) and both[0].poll() is None:
            time.sleep(0.02)
        for one in who:
            both[one].send_signal(number)
        errors = [one.communicate(timeout=300)[1] for one in both]
    assert [one.returncode for one in both] == [STATUS[number]] * 2, errors
    assert errors[0] == errors[1] and SENTENCE.fullmatch(errors[0])
    step = saved_steps(folder)[-1]
    assert f"at step {step}; the same command resumes from step {step}" in errors[0]
    assert read_metrics(folder)[-1]["step"] == step < JOINED.steps
