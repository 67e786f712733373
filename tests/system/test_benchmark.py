"""The benchmark measures what it says, on models so small that it takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.benchmarks.benchmarking import QUIET, in_turns, peak_bytes, wait_until_idle
from experiments.benchmarks.compression_costs import make_task, memory, overhead

ROOT = Path(__file__).parents[2]


def test_programs_take_turns_and_the_first_does_not_count():
    order = []
    seconds = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2)
    assert order == list("ababab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_peak_memory_counts_what_is_held():
    shape = jax.ShapeDtypeStruct((1000,), np.float32)
    add = lambda x, y: x + y
    assert peak_bytes(add, shape, shape) == 3 * 4000
    assert peak_bytes(add, shape, shape, donate=(0,)) == 2 * 4000


def test_waiting_ends(monkeypatch):
    monkeypatch.setattr("experiments.benchmarks.benchmarking.Others.share", lambda self: 2 * QUIET)
    assert wait_until_idle(0.0) == 2 * QUIET


def test_overhead_tells_each_compressor_beside_the_gradient():
    figures = overhead(
        make_task("logistic", (4, 4, 3), 2), ["grbs:8", "top_k:8", "sign"], repeats=2
    )
    assert figures["parameters"] == 48 * 10 + 10
    assert figures["gradient"]["least"] > 0
    assert list(figures["compressors"]) == ["grbs:8", "top_k:8", "sign"]
    for row in figures["compressors"].values():
        assert 0 < row["ratio"]["least"] <= row["ratio"]["median"] <= row["ratio"]["most"]
        assert 0 < row["bits"] < 32 * figures["parameters"] / 4


def test_memory_of_methods_above_local_sgd():
    """CSER keeps one anchor; error feedback an anchor and an error a worker."""
    figures = memory(make_task("logistic", (16, 16, 3), 1), workers=4, steps=1)
    kept = {name: m["kept_above"] for name, m in figures["methods"].items()}
    peak = {name: m["peak_above"] for name, m in figures["methods"].items()}
    assert figures["model_bytes"] == 4 * (16 * 16 * 3 * 10 + 10)
    assert kept["local_sgd"] == kept["data_parallel"] == peak["local_sgd"] == 0
    assert kept["cser"] == 1 <= peak["cser"]
    assert kept["qsparse_local_sgd"] == kept["ef_sgd"] == 1 + 4 <= peak["qsparse_local_sgd"]


def test_the_binary_prints_a_table_and_writes_json(tmp_path):
    output = tmp_path / "figures.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.benchmark", "--suite=compression"),
            *("--model=logistic", "--image=8", "--wait_idle=0"),
            *("--memory_model=logistic", "--workers=2", "--batch_size=2", "--repeats=1"),
            *("--compressors=grbs:8", f"--output={output}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "grbs:8" in done.stdout and "peak of a round" in done.stdout
    figures = json.loads(output.read_text())
    assert figures["suite"] == "compression" and len(figures["others_during"]) == 1
    assert set(figures["overhead"]["compressors"]) == {"grbs:8"}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--suite=sped", "did you mean 'speed'"),
        ("--workloads=mll_cnn,resnet", "unknown workload 'resnet'; did you mean 'resnet18'"),
        ("--worker_map=vmp", "unknown worker map 'vmp'"),
        ("--repeats=0", "repeats"),
        ("--output=nowhere/figures.json", "--output=nowhere/figures.json is in a folder"),
        ("--output=experiments", "--output=experiments is no name for a file"),
        ("--workloads=", "--workloads= names none; there are logistic"),
    ],
)
def test_mistakes_end_in_one_sentence(flag, words):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", "--wait_idle=0", flag],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
