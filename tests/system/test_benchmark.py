"""The benchmark's command, its timings and the suite `compression`, on a model of one layer."""

import json

import jax
import numpy as np
import pytest
from binaries import call, call_new

from experiments.benchmarks.compression.suite import COMPRESSORS
from experiments.benchmarks.machine_load import BUSY_SHARE, wait_until_idle
from experiments.benchmarks.memory import peak_bytes
from experiments.benchmarks.scaling.group import GroupTimings
from experiments.benchmarks.scaling.slow_link import NoLink
from experiments.benchmarks.speed.interleaved import Timings
from experiments.benchmarks.timing import interleaved_seconds

SIDE, WORKERS = 16, 4
PARAMETERS = SIDE * SIDE * 3 * 10 + 10
TIMED = ["grbs:8", "top_k:8", "sign"]


@pytest.fixture(scope="module")
def compression(tmp_path_factory):
    """One run of the suite: what the command printed, and the figures that it wrote."""
    output = tmp_path_factory.mktemp("benchmark") / "figures.json"
    called = call(
        *("benchmark", "--suite=compression", "--wait_idle=0", f"--output={output}"),
        *("--model=logistic", f"--image={SIDE}", "--batch_size=1", "--repeats=2"),
        *("--memory_model=logistic", f"--workers={WORKERS}", f"--compressors={','.join(TIMED)}"),
    )
    assert called.status == 0, called.error
    return called.out, json.loads(output.read_text())


def test_programs_alternate_and_the_first_run_does_not_count():
    order = []
    programs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = interleaved_seconds(programs, repeats=2)
    assert order == list("ababab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_peak_memory_counts_arguments_and_results():
    shape = jax.ShapeDtypeStruct((1000,), np.float32)
    add = lambda x, y: x + y
    assert peak_bytes(add, shape, shape) == 3 * 4000
    assert peak_bytes(add, shape, shape, donate=(0,)) == 2 * 4000


def test_waiting_for_an_idle_machine_ends(monkeypatch):
    load = "experiments.benchmarks.machine_load.OtherLoad.share"
    monkeypatch.setattr(load, lambda self: 2 * BUSY_SHARE)
    assert wait_until_idle(0.0) == 2 * BUSY_SHARE


def test_each_compressor_is_timed_against_the_gradient(compression):
    figures = compression[1]["sync_times"]
    assert figures["parameters"] == PARAMETERS
    assert figures["gradient"]["min"] > 0
    assert list(figures["compressors"]) == TIMED
    for row in figures["compressors"].values():
        assert 0 < row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
        assert 0 < row["bits"] < 32 * figures["parameters"] / 4


def test_memory_of_methods_above_local_sgd(compression):
    """CSER keeps one anchor; error feedback keeps an anchor, and a residual of every worker."""
    figures = compression[1]["memory"]
    state = {name: m["state_above"] for name, m in figures["methods"].items()}
    peak = {name: m["peak_above"] for name, m in figures["methods"].items()}
    assert figures["model_bytes"] == 4 * PARAMETERS
    assert state["local_sgd"] == state["data_parallel"] == peak["local_sgd"] == 0
    assert state["cser"] == 1 <= peak["cser"]
    assert state["qsparse_local_sgd"] == state["ef_sgd"] == 1 + WORKERS
    assert state["qsparse_local_sgd"] <= peak["qsparse_local_sgd"]


def test_the_command_prints_a_table_and_writes_json(compression):
    printed, figures = compression
    assert "grbs:8" in printed and "peak of a round" in printed
    assert figures["suite"] == "compression" and len(figures["other_load_during"]) == 1
    assert set(figures["sync_times"]["compressors"]) == set(TIMED)


def run_suite(suite, folder):
    """The exit status of a suite on one workload, what it printed, and its figures."""
    output = folder / "figures.json"
    flags = ("--workloads=softmax", "--repeats=2", "--wait_idle=0", f"--output={output}")
    called = call("benchmark", f"--suite={suite}", *flags)
    return called.status, called.out, json.loads(output.read_text())


@pytest.mark.parametrize("failure", [None, "not done in 300 s"])
def test_the_suite_speed_fails_where_jaxlocal_fails(failure, monkeypatch, tmp_path):
    def time_interleaved(commands, repeats, limit):
        timings = {name: Timings({}, [{"seconds": 4.0}] * repeats) for name in commands}
        own = [{"seconds": 2.0}] * repeats
        return {**timings, "jaxlocal": Timings({}, [] if failure else own, failure)}, 0.5

    monkeypatch.setattr(
        "experiments.benchmarks.speed.comparison.time_interleaved", time_interleaved
    )
    status, printed, figures = run_suite("speed", tmp_path)
    assert (status, figures["complete"]) == ((1, False) if failure else (0, True))
    assert "softmax, 100 workers × 300, 8 steps" in printed and "was busy" in printed
    assert figures["other_load_during"] == [0.5] and figures["busy"]
    row = figures["workloads"][0]["contenders"]["vmap"]
    assert row["seconds"] == [4.0, 4.0]
    assert row.get("ratio") == (None if failure else {"median": 2.0, "min": 2.0, "max": 2.0})


def test_the_suite_scaling_does_without_a_link_that_cannot_be_slowed_down(monkeypatch, tmp_path):
    def time_groups(workload, requests, repeats, limit, link=None):
        seconds = {s: {r: [1.0] * repeats for r in asked} for s, asked in requests.items()}
        return {setup: GroupTimings(one, {}) for setup, one in seconds.items()}, None

    def slow_link(count, mbps, ms):
        raise NoLink("network namespaces need root")

    monkeypatch.setattr("experiments.benchmarks.scaling.speedups.time_groups", time_groups)
    monkeypatch.setattr("experiments.benchmarks.scaling.suite.slow_link", slow_link)
    status, printed, figures = run_suite("scaling", tmp_path)
    assert status == 0 and figures["complete"] and figures["link"] == []
    assert figures["link_missing"] == "network namespaces need root"
    assert "this machine cannot slow down a link: network namespaces need root" in printed
    rows = figures["scaling"][0]
    # One device and eight take the same time for a step of all their workers.
    assert rows["weak"]["8 devices"]["methods"]["cser"]["speedup"]["median"] == 8.0
    assert rows["strong"]["8 devices"]["methods"]["cser"]["speedup"]["median"] == 1.0


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--suite=sped", "did you mean 'speed'"),
        ("--workloads=mll_cnn,resnet", "unknown workload 'resnet'; did you mean 'resnet18'"),
        ("--worker_map=vmp", "unknown worker map 'vmp'"),
        ("--repeats=0", "repeats"),
        ("--output=nowhere/figures.json", "--output=nowhere/figures.json is in a folder"),
        ("--output=/proc/figures.json", "--output=/proc/figures.json cannot be written: No such"),
        ("--output=experiments", "--output=experiments is not the name of a file"),
        ("--workloads=", "--workloads= names none; there are logistic"),
    ],
)
def test_mistakes_end_in_one_sentence(flag, words):
    called = call("benchmark", "--wait_idle=0", flag)
    assert called.status == 2 and words in called.error
    assert called.error.startswith("error: ") and called.error.count("\n") == 1


@pytest.mark.slow
def test_the_command_starts_in_a_new_process():
    called = call_new("benchmark", "--help")
    assert called.status == 0, called.error
    assert "Suite to run: speed, compression, compilation, scaling, start, peers." in called.out
    assert all(spec in called.out for spec in COMPRESSORS)
