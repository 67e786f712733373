"""Processes take turns, and what one of them does wrong ends as a word in its row."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from experiments.benchmarks.benchmarking import Others, processor_ticks, wait_until_idle
from experiments.benchmarks.speed import suite, turns
from experiments.benchmarks.speed.contender import parse_workload
from experiments.benchmarks.speed.turns import Child, Gone, take_turns
from experiments.benchmarks.speed.workloads import WORKLOADS, Workload

ROOT = Path(__file__).parents[2]
ANSWERS = """
import json, sys
print(json.dumps({"compile_seconds": 1.0}), flush=True)
for turn, _ in enumerate(sys.stdin):
    print(json.dumps({"seconds": float(turn)}), flush=True)
"""


def python(code):
    return [sys.executable, "-c", code]


def test_the_first_answer_does_not_count():
    said, others = take_turns({"a": python(ANSWERS), "b": python(ANSWERS)}, 2, limit=60)
    for name in "ab":
        assert said[name].ready == {"compile_seconds": 1.0}
        assert said[name].seconds == [1.0, 2.0] and said[name].failure is None
    assert others is None or 0 <= others <= 1


def test_who_does_not_answer_is_killed():
    commands = {
        "never ready": python("import time; time.sleep(99)"),
        "stops": python("print('{}', flush=True); input(); import time; time.sleep(99)"),
    }
    said, _ = take_turns(commands, 1, limit=2)
    assert all(turn.failure == "not done in 2 s" for turn in said.values())
    assert not any(turn.answers for turn in said.values())


def test_who_fails_says_why():
    commands = {
        "dies": python("raise SystemExit('no such thing')"),
        "dies later": python("print('{}', flush=True); input(); 1 / 0"),
        "quiet": python("raise SystemExit(3)"),
    }
    said, _ = take_turns(commands, 1, limit=60)
    assert {name: turn.failure for name, turn in said.items()} == {
        "dies": "failed: no such thing",
        "dies later": "failed: ZeroDivisionError: division by zero",
        "quiet": "failed: exit status 3",
    }


def test_an_interruption_ends_the_children(monkeypatch):
    started = []

    class Interrupted(Child):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self)

        def ask(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(turns, "Child", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        take_turns({"a": python(ANSWERS), "b": python(ANSWERS)}, 1, limit=60)
    assert len(started) == 2
    for child in started:
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)


def test_a_line_may_come_in_parts():
    code = "import sys, time; w = sys.stdout; w.write('{\"a\"'); w.flush(); time.sleep(0.2)\n"
    child = Child(python(code + "w.write(': 1}\\n{}\\n')"), 60)
    try:
        assert child.answer() == {"a": 1} and child.answer() == {}
        with pytest.raises(Gone, match="exit status 0"):
            child.answer()
    finally:
        child.close()


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="counts as Linux does")
def test_the_work_of_children_is_not_that_of_others():
    with subprocess.Popen(python("while True: pass")) as child:
        known, unknown = Others([child.pid]), Others()
        while processor_ticks(child.pid) < 50:  # of 10 ms
            time.sleep(0.05)
        without, with_it = known.share(), unknown.share()
        child.kill()
    assert 0 <= without < with_it <= 1


def test_an_idle_machine_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(Others, "share", lambda self: 0.0)
    start = time.monotonic()
    assert wait_until_idle(60.0) == 0.0 and time.monotonic() - start < 30


def test_workloads_are_named_or_given():
    given = Workload("tiny", "mlp", 2, 3, 4, (8, 8, 1), 10, 20)
    assert parse_workload(suite.as_json(given)) == given
    assert parse_workload("mlp") is WORKLOADS["mlp"]


def test_a_tiny_workload_from_processes_to_the_table(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no PyTorch
    workload = Workload("tiny", "logistic", 2, 3, 2, (4, 4, 1), 10, 20)
    names = ("jaxlocal", "vmap", "torch", "arithmetic")
    figures = suite.compare(workload, 2, 120.0, None, names)
    rows = figures["contenders"]
    assert rows["torch"] == {"failure": "not installed"}
    assert rows["arithmetic"]["flops"] == 2 * 2 * 3 * 2 * 2 * 16 * 10
    for name in ("jaxlocal", "vmap"):
        assert rows[name]["compile_seconds"] > max(rows[name]["seconds"]) > 0
        assert rows[name]["memory_bytes"] > 0 and len(rows[name]["seconds"]) == 2
    assert rows["jaxlocal"]["ratio"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    assert not suite.different_losses(rows)
    out = io.StringIO()
    suite.show_workload(figures, Console(file=out, width=120))
    assert "tiny, 2 workers × 3, 2 steps" in out.getvalue() and "not installed" in out.getvalue()


def test_the_faster_of_shared_weights_is_shown():
    row = {"failure": None, "compile_seconds": 1.0}
    took = {"jaxlocal": 1.0, "shared": 0.5, "shared_parallel": 0.25}
    rows = {name: {**row, "seconds": [seconds]} for name, seconds in took.items()}
    out = io.StringIO()
    figures = {**WORKLOADS["mlp"]._asdict(), "contenders": rows}
    suite.show_workload(figures, Console(file=out, width=120))
    assert "all devices" in out.getvalue() and "one device" not in out.getvalue()


def test_losses_that_differ_are_told():
    row = {"failure": "not done in 1 s", "compile_seconds": 1.0}
    rows = {"jaxlocal": {**row, "loss": 1.0}, "vmap": {**row, "loss": 1.1}, "torch": row}
    assert suite.different_losses(rows) == ["vmap"]
    out = io.StringIO()
    figures = {**WORKLOADS["mlp"]._asdict(), "contenders": rows}
    suite.show_workload(figures, Console(file=out, width=120))
    assert "not the same training" in out.getvalue() and "not done in 1 s" in out.getvalue()
