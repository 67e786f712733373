"""The suite `scaling`: figures from given seconds, and from processes that train a small model."""

import io
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from binaries import call
from rich.console import Console

from experiments.benchmarks.child_process import ChildProcess
from experiments.benchmarks.scaling import setups, slow_link, tables
from experiments.benchmarks.scaling.group import Group, GroupTimings, time_groups
from experiments.benchmarks.scaling.link_costs import (
    link_rows,
    measure_over_link,
    predicted_seconds,
)
from experiments.benchmarks.scaling.setups import (
    ALONE,
    DATA_PARALLEL,
    LOCAL_STEPS,
    METHODS,
    Request,
    Setup,
)
from experiments.benchmarks.scaling.slow_link import Link, NoLink, check_speed
from experiments.benchmarks.scaling.speedups import measure_speedups, speedup_row
from experiments.benchmarks.workloads import WORKLOADS, Workload
from jaxlocal import ConfigurationError

TINY = Workload("tiny", "logistic", 2, 3, 4, (28, 28, 1), 10, 20)
MODEL_BYTES = 4 * (28 * 28 * 10 + 10)
FEW = (LOCAL_STEPS, "local_sgd", DATA_PARALLEL)


def shown(show, figures, workload=TINY):
    out = io.StringIO()
    show(workload, figures, Console(file=out, width=200))
    return out.getvalue()


def constant(setup_seconds, slow=(False,)):
    """Timings of two repeats that took the same time."""
    seconds = {
        Request(method, workers, on): [took, took]
        for (method, workers), took in setup_seconds.items()
        for on in slow
    }
    return GroupTimings(seconds, {request: [] for request in seconds})


def test_speedups_by_hand():
    alone = {(m, 8): 16.0 for m in METHODS} | {(m, 1): 2.0 for m in METHODS}
    four = {(m, 8): 8.0 for m in METHODS} | {(m, 4): 4.0 for m in METHODS}
    timings = {ALONE: constant(alone), Setup(4): constant(four)}
    strong = speedup_row(Setup(4), {ALONE: 8, Setup(4): 8}, timings, steps=4)
    weak = speedup_row(Setup(4), {ALONE: 1, Setup(4): 4}, timings, steps=4)
    assert strong["methods"]["cser"]["seconds"] == [2.0, 2.0]
    assert strong["methods"]["cser"]["speedup"]["median"] == 2.0
    # Four workers step in 4 s, and one worker in 2 s.
    assert weak["methods"]["cser"]["speedup"]["median"] == 2.0 and weak["workers"] == 4
    figures = {"strong": {"4 devices": strong}, "weak": {"4 devices": weak}, "cores": 2}
    text = shown(tables.show_speedups, {**figures, "failures": {"8 devices": "failed: gone"}})
    assert "2e+03, 2.00×" in text and "8 devices failed: gone" in text and "2 cores" in text


def test_the_prediction_by_hand():
    # A ring of two: 2 messages of 1 ms and 10⁶ bytes at 100 Mbit/s, 80 ms; three times in a round
    # of two steps of 10 ms.
    link = SimpleNamespace(mbps=100.0, ms=1.0)
    collectives = [("all-reduce", 10**6, 2, 3)]
    assert predicted_seconds(0.01, collectives, 2, 2, link) == pytest.approx(
        (3 * 0.082 + 2 * 0.01) / 2
    )
    # A ring of four: 3 messages, and (n − 1)/n of the gathered bytes, twice in a round.
    gathered = [("all-gather", 10**6, 4, 2)]
    assert predicted_seconds(0.01, gathered, 1, 4, link) == pytest.approx(2 * (0.003 + 0.06) + 0.01)
    assert predicted_seconds(0.01, [], 16, 4, link) == pytest.approx(0.01)


def test_the_table_of_a_link_by_hand():
    took = {(m, 2): 1.0 for m in METHODS} | {(LOCAL_STEPS, 2): 0.5, (DATA_PARALLEL, 2): 2.0}
    timings = constant(took, (False, True))
    link = SimpleNamespace(mbps=1.0, ms=0.0)
    rows = link_rows(timings, Setup(processes=2), TINY, link)
    assert list(rows) == list(METHODS)
    assert rows["cser"]["predicted"] == rows["cser"]["overhead"] == 0.125  # half a second, 4 steps
    assert rows["cser"]["ratio_to_predicted"]["median"] == 2.0
    assert rows["cser"]["ratio_to_predicted_and_overhead"]["median"] == 1.0
    assert rows["cser"]["speedup_over_data_parallel"]["median"] == 2.0
    figures = {"mbps": 1.0, "ms": 0.0, "processes": {"2 processes": rows}}
    text = shown(tables.show_link_costs, {**figures, "failures": {}})
    row = next(line for line in text.splitlines() if line.startswith("cser"))
    figures_in_row = "250 (250–250) 125 2.00× 125 1.00× 2.00×"
    assert " ".join(row.split()[1:]) == figures_in_row
    assert "tiny over 1 Mbit/s, 2 processes, 2 workers" in text


def test_all_workloads_divide_over_all_setups():
    for workload in map(setups.sized, WORKLOADS.values()):
        assert not any(workload.workers % setup.total for setup in setups.SETUPS)


@pytest.mark.slow
def test_figures_of_devices_and_of_processes_are_alike():
    figures = measure_speedups(TINY, 1, 240.0, (ALONE, Setup(devices=2), Setup(processes=2)), FEW)
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
    text = shown(tables.show_speedups, figures)
    assert "2 processes" in text and "weak scaling: tiny, one worker per device" in text


REPLIES = """
import json, sys
print("{}", flush=True)
for number, line in enumerate(sys.stdin):
    assert json.loads(line)[0] != "local_sgd", "unknown method"
    print(json.dumps({"seconds": number + NUMBER, "collectives": []}), flush=True)
"""


def test_the_slowest_process_counts_and_a_failed_group_is_left_out(monkeypatch):
    def start(self):
        for number in range(self._setup.processes):
            code = REPLIES.replace("NUMBER", str(number))
            self.children.append(ChildProcess([sys.executable, "-c", code], 60))

    monkeypatch.setattr(Group, "start", start)
    requests = {
        Setup(processes=2): [Request("cser", 2), Request(DATA_PARALLEL, 2)],
        ALONE: [Request("cser", 2), Request("local_sgd", 2)],
    }
    timings, load = time_groups(TINY, requests, 2, 60)
    good, bad = timings.values()
    assert good.failure is None and bad.failure == "failed: AssertionError: unknown method"
    # Replies 2, 3, 4, 5 of each process count; the second process takes one second more.
    assert list(good.seconds.values()) == [[3, 5], [4, 6]]
    assert load is None or 0 <= load <= 1


def test_why_there_is_no_slow_link(monkeypatch):
    for wrong, words in (
        ((0, 1), "--link_mbps must be a number > 0, got 0"),
        ((1, -1), "≥ 0, got -1"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            check_speed(*wrong)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(NoLink, match="need root"), slow_link.slow_link(2, 1, 0):
        pass
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(slow_link, "_run", lambda *command: fail_link(command))
    with pytest.raises(NoLink, match="ip netns add"), slow_link.slow_link(2, 1, 0):
        pass


def fail_link(command):
    raise NoLink(f"`{' '.join(command)}` failed")


@pytest.mark.parametrize("kernel_has_netem", [True, False])
def test_netem_delays_packets_where_the_kernel_has_it(kernel_has_netem, monkeypatch):
    commands = []

    def run(*command):
        commands.append(" ".join(command))
        if "netem" in command and not kernel_has_netem:
            fail_link(command)

    monkeypatch.setattr(slow_link, "_run", run)
    link = Link("net", 2, 8.0, 0.5)
    commands.clear()
    for slow in (False, True, True, False):
        link.set_slow(slow)
    rule = "netem rate 8000000bit delay 500us limit 16384"
    if not kernel_has_netem:
        rule = "tbf rate 8000000bit burst 3028 limit 16777216"
    assert link.ms == (0.5 if kernel_has_netem else 0.0)
    tc = [f"tc -n net-{number} qdisc" for number in range(2)]
    replaced = [f"{start} replace dev eth0 root {rule}" for start in tc]
    assert commands == [*replaced, *(f"{start} del dev eth0 root" for start in tc)]


def namespaces():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


@pytest.fixture
def one_megabit():
    try:
        with slow_link.slow_link(2, 1.0, 0.0) as link:
            yield link
    except NoLink as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
def test_local_sgd_beats_data_parallel_over_a_slow_link(one_megabit):
    figures = measure_over_link(TINY, 1, 240.0, one_megabit, (Setup(processes=2),), FEW)
    assert not figures["failures"], figures["failures"]
    rows = figures["processes"]["2 processes"]
    seconds = {method: np.median(row["seconds"]) for method, row in rows.items()}
    # No message is faster than the link, but for what its bucket holds; Local SGD sends a quarter.
    sending = MODEL_BYTES * 8 / 1e6
    assert seconds[DATA_PARALLEL] >= 0.9 * sending > 0.2
    assert rows["local_sgd"]["predicted"] - rows[LOCAL_STEPS]["predicted"] == pytest.approx(
        sending / 4
    )
    assert rows[DATA_PARALLEL]["predicted"] - rows[LOCAL_STEPS]["predicted"] == pytest.approx(
        sending
    )
    assert rows["local_sgd"]["speedup_over_data_parallel"]["median"] > 1
    assert "data parallel" in shown(tables.show_link_costs, figures)


def test_an_interruption_removes_the_link():
    before = namespaces() if shutil.which("ip") else set()
    try:
        with slow_link.slow_link(2, 100.0, 0.0) as link:
            inside = namespaces() - before
            assert len(inside) == 3
            command = [*link.command_prefix(1), "cat", "/etc/hosts"]
            hosts = subprocess.run(command, capture_output=True).stdout
            assert link.address(1).encode() in hosts
            raise KeyboardInterrupt
    except NoLink as reason:
        pytest.skip(str(reason))
    except KeyboardInterrupt:
        pass
    assert not namespaces() & inside
    assert not any((slow_link.HOSTS / name).exists() for name in inside)


def test_a_link_without_speed_ends_in_one_sentence():
    called = call("benchmark", "--suite=scaling", "--link_mbps=0")
    assert (called.status, called.error) == (
        2,
        "error: --link_mbps must be a number > 0, got 0\n",
    )
