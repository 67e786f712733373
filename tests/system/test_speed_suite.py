"""Contenders are timed in alternation, and the failure of one of them appears in its row."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from experiments.benchmarks import machine_load
from experiments.benchmarks.child_process import ChildFailed, ChildProcess
from experiments.benchmarks.machine_load import OtherLoad, cpu_seconds, wait_until_idle
from experiments.benchmarks.speed import growth, interleaved, tables
from experiments.benchmarks.speed.comparison import compare_contenders, different_losses
from experiments.benchmarks.speed.interleaved import time_interleaved
from experiments.benchmarks.workloads import (
    WORKLOADS,
    Workload,
    parse_workload,
    workload_to_json,
)

REPLIES = """
import json, sys
print(json.dumps({"compile_seconds": 1.0}), flush=True)
for number, _ in enumerate(sys.stdin):
    print(json.dumps({"seconds": float(number)}), flush=True)
"""


def test_time_and_memory_of_more_workers():
    small = WORKLOADS["softmax"]._replace(batch_size=2, steps=2, examples=64)
    figures = growth.measure_growth(small, (2, 64), repeats=1, limit=120)
    few, many = (figures["workers"][n] for n in ("2", "64"))
    assert not few["failure"] and not many["failure"] and len(many["seconds"]) == 1
    assert many["program_bytes"] < 1.2 * few["program_bytes"]  # one model, whatever the workers
    console = Console(file=io.StringIO(), width=120)
    tables.show_growth(figures, console)
    printed = console.file.getvalue()
    assert "softmax × 2 with more workers, 2 steps" in printed and "64" in printed


def python(code):
    return [sys.executable, "-c", code]


def test_the_first_reply_does_not_count():
    timings, load = time_interleaved({"a": python(REPLIES), "b": python(REPLIES)}, 2, limit=60)
    for name in "ab":
        assert timings[name].ready == {"compile_seconds": 1.0}
        assert timings[name].seconds == [1.0, 2.0] and timings[name].failure is None
    assert load is None or 0 <= load <= 1


def test_a_process_that_does_not_reply_is_killed():
    commands = {
        "never ready": python("import time; time.sleep(99)"),
        "stops": python("print('{}', flush=True); input(); import time; time.sleep(99)"),
    }
    timings, _ = time_interleaved(commands, 1, limit=1)
    assert all(one.failure == "not done in 1 s" for one in timings.values())
    assert not any(one.replies for one in timings.values())


def test_a_failure_states_its_reason():
    commands = {
        "dies": python("raise SystemExit('no such thing')"),
        "dies later": python("print('{}', flush=True); input(); 1 / 0"),
        "quiet": python("raise SystemExit(3)"),
    }
    timings, _ = time_interleaved(commands, 1, limit=60)
    assert {name: one.failure for name, one in timings.items()} == {
        "dies": "failed: no such thing",
        "dies later": "failed: ZeroDivisionError: division by zero",
        "quiet": "failed: exit status 3",
    }


def test_an_interruption_ends_the_children(monkeypatch):
    started = []

    class Interrupted(ChildProcess):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self)

        def request(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(interleaved, "ChildProcess", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        time_interleaved({"a": python(REPLIES), "b": python(REPLIES)}, 1, limit=60)
    assert len(started) == 2
    for child in started:
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)


def test_a_reply_may_arrive_in_parts():
    code = "import sys, time; w = sys.stdout; w.write('{\"a\"'); w.flush(); time.sleep(0.2)\n"
    child = ChildProcess(python(code + "w.write(': 1}\\n{}\\n')"), 60)
    try:
        assert child.reply() == {"a": 1} and child.reply() == {}
        with pytest.raises(ChildFailed, match="exit status 0"):
            child.reply()
    finally:
        child.close()


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="counts as Linux does")
def test_the_processes_of_a_child_count_as_its_own_and_end_with_it():
    code = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'while True: 0'])\n"
    child = ChildProcess(python(code + "print(p.pid, flush=True); input()"), 60)
    try:
        grandchild = child.reply()
        while cpu_seconds(grandchild) < 0.2:
            time.sleep(0.05)
        assert cpu_seconds(child.pid) >= 0.2
    finally:
        child.close()
    while Path(f"/proc/{grandchild}").exists() and not is_zombie(grandchild):
        time.sleep(0.05)


def is_zombie(pid):
    """Whether a process has ended and waits for its new parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="counts as Linux does")
def test_the_load_of_children_is_not_that_of_others():
    with subprocess.Popen(python("while True: pass")) as child:
        known, unknown = OtherLoad([child.pid]), OtherLoad()
        while cpu_seconds(child.pid) < 0.5:
            time.sleep(0.05)
        without, with_it = known.share(), unknown.share()
        child.kill()
    assert 0 <= without < with_it <= 1


def test_an_idle_machine_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(OtherLoad, "share", lambda self: 0.0)
    monkeypatch.setattr(machine_load, "SAMPLE_SECONDS", 0.1)
    start = time.monotonic()
    assert wait_until_idle(60.0) == 0.0 and time.monotonic() - start < 30


def test_a_workload_is_read_from_its_name_or_its_fields():
    given = Workload("tiny", "mlp", 2, 3, 4, (8, 8, 1), 10, 20)
    assert parse_workload(workload_to_json(given)) == given
    assert parse_workload("mlp") is WORKLOADS["mlp"]


@pytest.mark.slow
def test_contenders_of_a_tiny_workload_from_processes_to_the_table(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no PyTorch
    workload = Workload("tiny", "logistic", 2, 3, 2, (4, 4, 1), 10, 20)
    names = ("jaxlocal", "vmap", "torch", "arithmetic")
    figures = compare_contenders(workload, 2, 120.0, None, names)
    rows = figures["contenders"]
    assert rows["torch"] == {"failure": "not installed"}
    assert rows["arithmetic"]["flops"] == 2 * 2 * 3 * 2 * 2 * 16 * 10
    for name in ("jaxlocal", "vmap"):
        assert rows[name]["compile_seconds"] > max(rows[name]["seconds"]) > 0
        assert rows[name]["memory_bytes"] > 0 and len(rows[name]["seconds"]) == 2
    assert rows["jaxlocal"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert not different_losses(rows)
    out = io.StringIO()
    tables.show_comparison(figures, Console(file=out, width=120))
    assert "tiny, 2 workers × 3, 2 steps" in out.getvalue() and "not installed" in out.getvalue()


def test_the_faster_shared_model_is_shown():
    row = {"failure": None, "compile_seconds": 1.0}
    took = {"jaxlocal": 1.0, "shared": 0.5, "shared_parallel": 0.25}
    rows = {name: {**row, "seconds": [seconds]} for name, seconds in took.items()}
    out = io.StringIO()
    figures = {**WORKLOADS["mlp"]._asdict(), "contenders": rows}
    tables.show_comparison(figures, Console(file=out, width=120))
    assert "all devices" in out.getvalue() and "one device" not in out.getvalue()


def test_different_losses_are_reported():
    row = {"failure": "not done in 1 s", "compile_seconds": 1.0}
    rows = {"jaxlocal": {**row, "loss": 1.0}, "vmap": {**row, "loss": 1.1}, "torch": row}
    assert different_losses(rows) == ["vmap"]
    out = io.StringIO()
    figures = {**WORKLOADS["mlp"]._asdict(), "contenders": rows}
    tables.show_comparison(figures, Console(file=out, width=120))
    assert "not the same training" in out.getvalue() and "not done in 1 s" in out.getvalue()
