"""Pairs of runs that are started in one folder at random moments: one of them runs, and the folder
is as that of a single run."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from processes import ROOT
from short_runs import saved_steps, without_time

from experiments.running.metrics import METRICS, read_metrics

pytestmark = pytest.mark.slow

RUN = [
    *("--dataset=digits", "--model=mlp", "--workers=2", "--steps=2000", "--local_steps=8"),
    *("--eval_every=200", "--checkpoint_every=100"),
]
PAIRS = 2
REFUSED = re.compile(r"error: the workdir .* is in use by process \d+ on \S+; wait until .*\n")


def start(folder, *more):
    command = [sys.executable, "-m", "experiments.train", *RUN, f"--workdir={folder}", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def left(folder):
    """What a run leaves: its files, the steps of its checkpoints, and its metrics."""
    files = {path.name for path in folder.iterdir()}
    return files, saved_steps(folder), without_time(read_metrics(folder))


def test_of_two_runs_in_one_folder_one_runs(times, tmp_path):
    choose = random.Random(times)
    folder = tmp_path / "run"
    began = time.monotonic()
    single = start(folder)
    assert single.communicate(timeout=300)[1] == "" and single.returncode == 0
    seconds = time.monotonic() - began
    whole = left(folder)
    refused = 0
    for _ in range(PAIRS * times):
        shutil.rmtree(folder)
        first = start(folder)
        time.sleep(choose.choice([0.0, choose.uniform(0, 0.2), choose.uniform(0, seconds / 2)]))
        second = start(folder)
        ended = [(*one.communicate(timeout=300), one.returncode) for one in (first, second)]
        assert min(status for *_, status in ended) == 0
        for out, error, status in ended:
            if status:
                assert status == 2 and REFUSED.fullmatch(error) and not out, error
                refused += 1
            else:
                assert not error
        assert left(folder) == whole
    assert refused >= PAIRS * times // 2  # the others came when the first had ended


def test_a_suspended_run_holds_its_folder_and_a_killed_one_does_not(tmp_path):
    folder = tmp_path / "run"
    first = start(folder)
    while not (folder / METRICS).exists():
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)
    out, error = start(folder).communicate(timeout=300)
    assert REFUSED.fullmatch(error) and f"process {first.pid} on" in error and not out
    first.kill()
    again = start(folder)  # at once
    first.communicate()
    assert again.communicate(timeout=300)[1] == "" and again.returncode == 0
