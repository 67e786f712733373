"""What more devices gain and a slow link costs: figures from given seconds, and from real processes
on models so small that it takes seconds."""

import io
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from experiments.benchmarks.scaling import group, link, suite, tables
from experiments.benchmarks.scaling.contender import LOCAL_STEPS
from experiments.benchmarks.scaling.group import Answers, Group, Question, Setup
from experiments.benchmarks.scaling.link import NoLink, check_speed, slow_link
from experiments.benchmarks.scaling.suite import ALONE, DATA_PARALLEL, METHODS, predicted
from experiments.benchmarks.speed.turns import Child
from experiments.benchmarks.speed.workloads import WORKLOADS, Workload
from jaxlocal import ConfigurationError

ROOT = Path(__file__).parents[2]
TINY = Workload("tiny", "logistic", 2, 3, 4, (28, 28, 1), 10, 20)
MODEL_BYTES = 4 * (28 * 28 * 10 + 10)
FEW = (LOCAL_STEPS, "local_sgd", DATA_PARALLEL)


def shown(show, figures, workload=TINY):
    out = io.StringIO()
    show(workload, figures, Console(file=out, width=200))
    return out.getvalue()


def constant(setup_seconds, slow=(False,)):
    """Answers of two turns that took the same."""
    seconds = {
        Question(method, workers, on): [took, took]
        for (method, workers), took in setup_seconds.items()
        for on in slow
    }
    return Answers(seconds, {question: [] for question in seconds})


def test_speed_ups_by_hand():
    alone = {(m, 8): 16.0 for m in METHODS} | {(m, 1): 2.0 for m in METHODS}
    four = {(m, 8): 8.0 for m in METHODS} | {(m, 4): 4.0 for m in METHODS}
    said = {ALONE: constant(alone), Setup(4): constant(four)}
    strong = suite._gain(Setup(4), {ALONE: 8, Setup(4): 8}, said, steps=4)
    weak = suite._gain(Setup(4), {ALONE: 1, Setup(4): 4}, said, steps=4)
    assert strong["methods"]["cser"]["seconds"] == [2.0, 2.0]
    assert strong["methods"]["cser"]["speedup"]["median"] == 2.0
    # Four workers' steps in 4 s beside one's in 2 s.
    assert weak["methods"]["cser"]["speedup"]["median"] == 2.0 and weak["workers"] == 4
    figures = {"strong": {"4 devices": strong}, "weak": {"4 devices": weak}, "cores": 2}
    text = shown(tables.show_scaling, {**figures, "failures": {"8 devices": "failed: gone"}})
    assert "2e+03, 2.00×" in text and "8 devices failed: gone" in text and "2 cores" in text


def test_the_prediction_by_hand():
    # A ring of two: 2 messages of 1 ms and 10⁶ bytes at 100 Mbit/s, 80 ms; three times in a round
    # of two steps of 10 ms.
    slow = SimpleNamespace(mbps=100.0, ms=1.0)
    collectives = [("all-reduce", 10**6, 2, 3)]
    assert predicted(0.01, collectives, 2, 2, slow) == pytest.approx((3 * 0.082 + 2 * 0.01) / 2)
    # Of four: (n − 1)/n of the gathered bytes, and 3 messages; twice, beside what is said to none.
    gathered = [("all-gather", 10**6, 4, 2)]
    assert predicted(0.01, gathered, 1, 4, slow) == pytest.approx(2 * (0.003 + 0.06) + 0.01)
    assert predicted(0.01, [], 16, 4, slow) == pytest.approx(0.01)


def test_the_table_of_a_link_by_hand():
    took = {(m, 2): 1.0 for m in METHODS} | {(LOCAL_STEPS, 2): 0.5, (DATA_PARALLEL, 2): 2.0}
    answers = constant(took, (False, True))
    speed = SimpleNamespace(mbps=1.0, ms=0.0)
    rows = suite._beside(answers, Setup(processes=2), TINY, speed)
    assert list(rows) == list(METHODS)
    assert rows["cser"]["model"] == rows["cser"]["overhead"] == 0.125  # seconds a step of four
    assert rows["cser"]["to_model"]["median"] == 2.0
    assert rows["cser"]["to_model_and_overhead"]["median"] == 1.0
    assert rows["cser"]["faster"]["median"] == 2.0
    figures = {"mbps": 1.0, "ms": 0.0, "processes": {"2 processes": rows}}
    text = shown(tables.show_link, {**figures, "failures": {}})
    row = next(line for line in text.splitlines() if line.startswith("cser"))
    figures_in_row = "250 (250–250) 125 2.00× 125 1.00× 2.00×"
    assert " ".join(row.split()[1:]) == figures_in_row
    assert "tiny over 1 Mbit/s, 2 processes, 2 workers" in text


def test_all_workloads_divide_over_all_setups():
    for workload in map(suite.sized, WORKLOADS.values()):
        assert not any(workload.workers % setup.total for setup in suite.SETUPS)


def test_devices_and_processes_answer_alike(monkeypatch):
    monkeypatch.setattr(suite, "METHODS", FEW)
    setups = (ALONE, Setup(devices=2), Setup(processes=2))
    figures = suite.scale(TINY, 1, 240.0, setups)
    assert not figures["failures"] and figures["cores"] >= 1
    for kind, workers in (("strong", [2, 2, 2]), ("weak", [1, 2, 2])):
        rows = list(figures[kind].values())
        assert [row["workers"] for row in rows] == workers
        assert [row["devices"] for row in rows] == [1, 2, 2]
        for row in rows:
            assert list(row["methods"]) == list(FEW)
            assert all(
                len(m["seconds"]) == 1 and m["seconds"][0] > 0 for m in row["methods"].values()
            )
    alone = figures["weak"]["1 device"]["methods"]
    assert all(m["speedup"]["median"] == 1.0 for m in alone.values())
    text = shown(tables.show_scaling, figures)
    assert "2 processes" in text and "weak scaling: tiny, of one worker a device" in text


ANSWERS = """
import json, sys
print("{}", flush=True)
for number, line in enumerate(sys.stdin):
    assert json.loads(line)[0] != "local_sgd", "no such thing"
    print(json.dumps({"seconds": number + NUMBER, "collectives": []}), flush=True)
"""


def test_the_last_process_counts_and_who_dies_is_asked_no_more(monkeypatch):
    def start(self):
        for number in range(self._setup.processes):
            code = ANSWERS.replace("NUMBER", str(number))
            self.children.append(Child([sys.executable, "-c", code], 60))

    monkeypatch.setattr(Group, "start", start)
    asked = {
        Setup(processes=2): [Question("cser", 2), Question(DATA_PARALLEL, 2)],
        ALONE: [Question("cser", 2), Question("local_sgd", 2)],
    }
    said, others = group.ask_in_turn(TINY, asked, 2, 60)
    good, bad = said.values()
    assert good.failure is None and bad.failure == "failed: AssertionError: no such thing"
    # Answers 2, 3, 4, 5 of each process, of which the second takes one second more.
    assert list(good.seconds.values()) == [[3, 5], [4, 6]]
    assert others is None or 0 <= others <= 1


def test_who_cannot_have_a_link_is_told_why(monkeypatch):
    for wrong, words in (
        ((0, 1), "--link_mbps must be a number > 0, got 0"),
        ((1, -1), "≥ 0, got -1"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            check_speed(*wrong)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(NoLink, match="need root"), slow_link(2, 1, 0):
        pass
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(link, "_run", lambda *c: link_failure(c))
    with pytest.raises(NoLink, match="ip netns add"), slow_link(2, 1, 0):
        pass


def link_failure(command):
    raise NoLink(f"`{' '.join(command)}` said nothing")


@pytest.mark.parametrize("kernel_has_netem", [True, False])
def test_a_delay_is_made_by_netem_where_there_is_one(kernel_has_netem, monkeypatch):
    commands = []

    def run(*command):
        commands.append(" ".join(command))
        if "netem" in command and not kernel_has_netem:
            link_failure(command)

    monkeypatch.setattr(link, "_run", run)
    made = link.Link("net", 2, 8.0, 0.5)
    commands.clear()
    for on in (False, True, True, False):
        made.slow(on)
    rule = "netem rate 8000000bit delay 500us limit 16384"
    if not kernel_has_netem:
        rule = "tbf rate 8000000bit burst 3028 limit 16777216"
    assert made.ms == (0.5 if kernel_has_netem else 0.0)
    tc = [f"tc -n net-{number} qdisc" for number in range(2)]
    replaced = [f"{start} replace dev eth0 root {rule}" for start in tc]
    assert commands == [*replaced, *(f"{start} del dev eth0 root" for start in tc)]


def namespaces():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


@pytest.fixture
def one_megabit():
    try:
        with slow_link(2, 1.0, 0.0) as made:
            yield made
    except NoLink as reason:
        pytest.skip(str(reason))


def test_local_sgd_beats_data_parallel_over_a_slow_link(one_megabit, monkeypatch):
    monkeypatch.setattr(suite, "METHODS", FEW)
    figures = suite.over_link(TINY, 1, 240.0, one_megabit, (Setup(processes=2),))
    assert not figures["failures"], figures["failures"]
    rows = figures["processes"]["2 processes"]
    seconds = {method: np.median(row["seconds"]) for method, row in rows.items()}
    # No link is faster than its rate, but for what its bucket holds; Local SGD says a quarter.
    said = MODEL_BYTES * 8 / 1e6
    assert seconds[DATA_PARALLEL] >= 0.9 * said > 0.2
    assert rows["local_sgd"]["model"] - rows[LOCAL_STEPS]["model"] == pytest.approx(said / 4)
    assert rows[DATA_PARALLEL]["model"] - rows[LOCAL_STEPS]["model"] == pytest.approx(said)
    assert rows["local_sgd"]["faster"]["median"] > 1
    assert "data parallel" in shown(tables.show_link, figures)


def test_a_link_is_gone_afterwards_whatever_happens():
    before = namespaces() if shutil.which("ip") else set()
    try:
        with slow_link(2, 100.0, 0.0) as made:
            inside = namespaces() - before
            assert len(inside) == 3
            seen = subprocess.run([*made.within(1), "cat", "/etc/hosts"], capture_output=True)
            assert made.address(1).encode() in seen.stdout
            raise KeyboardInterrupt
    except NoLink as reason:
        pytest.skip(str(reason))
    except KeyboardInterrupt:
        pass
    assert not namespaces() & inside
    assert not any((link.HOSTS / name).exists() for name in inside)


def test_a_link_of_no_speed_ends_in_one_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", "--suite=scaling", "--link_mbps=0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "error: --link_mbps must be a number > 0, got 0\n",
    )
