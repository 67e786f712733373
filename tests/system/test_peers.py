"""Peers of the suite `peers` train what jaxlocal trains, and their ratios make one table."""

import json
import subprocess

import jax
import numpy as np
import pytest
from binaries import call

from experiments.benchmarks.peers import environment, install, plain_jax, suite
from experiments.benchmarks.peers.contender import PEERS
from experiments.benchmarks.peers.environment import REQUIREMENTS, installed_versions
from experiments.benchmarks.peers.tables import SAME_MODEL, different_models, markdown_table
from experiments.benchmarks.peers.workloads import PEER_WORKLOADS
from experiments.benchmarks.speed.comparison import compare_commands
from experiments.benchmarks.speed.fingerprint import NOISE, fingerprint, relative_difference
from experiments.benchmarks.speed.interleaved import Timings
from experiments.benchmarks.speed.jax_contenders import library_rounds
from experiments.benchmarks.workloads import Workload, initial_params, make_indices

WORKERS = jax.device_count()
TINY = {
    w.name: w
    for w in (
        Workload("softmax", "logistic", WORKERS, 3, 2, (4, 4, 1), 10, 20),
        Workload("logistic", "logistic", WORKERS, 3, 2, (4, 4, 1), 1, 20),
        Workload("mlp", "mlp", WORKERS, 3, 2, (4, 4, 1), 10, 20),
        Workload("cnn", "mll_cnn", WORKERS, 3, 2, (9, 8, 1), 6, 20),
        Workload("diloco", "transformer", WORKERS, 2, 3, (6,), 11, 20, "diloco", (1, 8)),
    )
}


def after(rounds, workload, count=2):
    """The average model after some rounds, leaves by their path, without those that are noise."""
    for number in range(count):
        rounds.run(make_indices(workload, number))
    leaves = jax.tree_util.tree_leaves_with_path(rounds.params())
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
    return {name: x for name, x in named.items() if not name.endswith(NOISE)}


@pytest.mark.parametrize("name", TINY)
def test_rounds_by_hand_train_the_same_model_as_jaxlocal(name):
    workload = TINY[name]
    params = initial_params(workload)
    expected = after(library_rounds(workload, params), workload)
    layers = [plain_jax.plain_rounds, plain_jax.library_layers_rounds]
    for rounds in layers if name != "mlp" else layers[:1]:
        trained = after(rounds(workload, params), workload)
        assert set(trained) == set(expected)
        for leaf, value in expected.items():
            np.testing.assert_allclose(trained[leaf], value, rtol=1e-3, atol=2e-5, err_msg=leaf)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["softmax", "cnn", "diloco"])
def test_installed_peers_train_the_same_model_as_jaxlocal(method):
    workload, versions = TINY[method]._replace(workers=2), installed_versions()
    names = [n for n in PEERS if PEERS[n].package and suite.runs(n, versions, workload)]
    if not names:
        pytest.skip("no peer is installed")
    commands = {name: suite.command(name, workload) for name in ("jaxlocal", *names)}
    figures = compare_commands(workload, commands, 1, 200.0)
    rows = figures["contenders"]
    assert {name: row["failure"] for name, row in rows.items() if row["failure"]} == {}
    assert max(rows[name]["difference"] for name in names) < SAME_MODEL / 10
    assert list(different_models(figures)) == []


def figures_of(name, rows):
    return {**PEER_WORKLOADS[name]._asdict(), "contenders": rows}


def test_the_table_has_a_row_for_each_peer_and_a_column_for_each_workload():
    ratio = {"median": 1.5, "min": 1.25, "max": 20.0}
    own, slower = {"seconds": [0.5, 0.25, 0.125]}, {"seconds": [1.0], "ratio": ratio}
    failed = {"failure": "failed: no memory"}
    first = figures_of("cnn_20", {"jaxlocal": own, "jax": slower, "torch": failed})
    second = figures_of("diloco_128", {"jaxlocal": own, "torchft": slower})
    assert markdown_table([first, second]).splitlines() == [
        "| workers × batch, steps | cnn_20: 20 × 32, 10 | diloco_128: 8 × 4, 10 |",
        "| --- | ---: | ---: |",
        "| jaxlocal | 0.25 s | 0.25 s |",
        "| plain JAX, all devices | 1.50× (1.25–20.0) |  |",
        "| PyTorch, one process | failed |  |",
        "| torchft, a process for each worker |  | 1.50× (1.25–20.0) |",
    ]


def test_peers_that_learn_something_else_are_named():
    rows = {
        "jaxlocal": {"loss": 1.0, "difference": 0.0},
        "jax": {"loss": 1.0, "difference": 2 * SAME_MODEL},
        "torch": {"loss": 1.1, "difference": 0.0},
        "fedjax": {"loss": None, "difference": SAME_MODEL / 2},
        "pfl": {"failure": "not done in 1 s"},
    }
    where = "not the same training: on cnn_20"
    assert list(different_models(figures_of("cnn_20", rows))) == [
        f"{where} plain JAX, all devices has moved elsewhere, by 6% of the way of jaxlocal",
        f"{where} PyTorch, one process has a loss of 1.1, jaxlocal one of 1",
    ]


def test_a_fingerprint_tells_models_apart_but_for_noise():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (30, 20), "queries_keys_values": {"bias": (9,)}}
    leaves = lambda: jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: type(x) is tuple)
    start, way, error = leaves(), leaves(), leaves()
    error["kernel"] *= 0.01
    end = jax.tree.map(np.add, start, way)
    near = jax.tree.map(np.add, end, error)
    prints = [fingerprint(model, start) for model in (near, end)]
    expected = np.linalg.norm(error["kernel"]) / np.linalg.norm(way["kernel"])
    assert 0.4 < relative_difference(*prints) / expected < 2.5
    assert relative_difference(prints[1], prints[1]) == 0


def run_suite(monkeypatch, folder, versions, *flags):
    """Run the command with made-up timings; what it called, and its figures."""

    def time_interleaved(commands, repeats, limit):
        seconds = {name: 2.0 if name == "jaxlocal" else 3.0 for name in commands}
        ready = {"loss": 1.0, "moved": [1.0, 2.0]}
        return {n: Timings(ready, [{"seconds": s}] * repeats) for n, s in seconds.items()}, 0.0

    module = "experiments.benchmarks.speed.comparison.time_interleaved"
    monkeypatch.setattr(module, time_interleaved)
    monkeypatch.setattr(suite, "installed_versions", lambda packages: versions)
    output = folder / "figures.json"
    command = ("benchmark", "--suite=peers", "--wait_idle=0", f"--output={output}")
    called = call(*command, "--repeats=2", *flags)
    assert called.status == 0, called.error
    return called.out, json.loads(output.read_text())


def test_without_any_peer_jaxlocal_is_compared_with_plain_jax(monkeypatch, tmp_path):
    printed, figures = run_suite(monkeypatch, tmp_path, {}, "--workloads=cnn_20,diloco_128")
    for package in REQUIREMENTS:
        sentence = f"without {package}, which is not installed: python -m experiments.benchmarks"
        assert sentence in printed
    plain = ["jaxlocal", "jax_1", "jax", "jax_layers_1", "jax_layers"]
    for part in figures["workloads"]:
        assert list(part["contenders"]) == plain
        assert part["contenders"]["jax"]["ratio"]["median"] == 1.5
        assert part["contenders"]["jax"]["difference"] == 0
    assert "| plain JAX, all devices | 1.50× (1.50–1.50) | 1.50× (1.50–1.50) |" in printed
    assert figures["cores"] >= 1 and figures["processor"] and figures["peer_versions"] == {}


def test_chosen_peers_run_what_they_can(monkeypatch, tmp_path):
    versions = {"torchft": "0.2.0", "flwr": "1.42.0"}
    flags = ("--workloads=softmax_100,diloco_128", "--peers=torchft,flower,drjax")
    printed, figures = run_suite(monkeypatch, tmp_path, versions, *flags)
    assert [list(part["contenders"]) for part in figures["workloads"]] == [
        ["jaxlocal", "flower"],
        ["jaxlocal", "torchft"],
    ]
    assert "without drjax" in printed and "without torchft" not in printed
    assert "torchft 0.2.0, flwr 1.42.0" in printed and figures["peer_versions"] == versions


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--peers=drjx", "unknown peer 'drjx'; did you mean 'drjax'"),
        ("--peers=", "--peers= names none; there are jaxlocal"),
        ("--workloads=cnn_30", "unknown workload 'cnn_30'; did you mean 'cnn_20'"),
    ],
)
def test_mistakes_end_in_one_sentence(flag, words):
    called = call("benchmark", "--suite=peers", "--wait_idle=0", flag)
    assert called.status == 2 and words in called.error
    assert called.error.startswith("error: ") and called.error.count("\n") == 1


def test_a_peer_that_cannot_be_installed_is_named_and_left_out(monkeypatch, tmp_path, capsys):
    asked = []

    def run(command):
        asked.append(command[4:])
        return subprocess.CompletedProcess(command, any("fedjax" in part for part in command))

    def create(folder, with_pip, symlinks):
        (folder / "lib" / "python3" / "site-packages").mkdir(parents=True)

    monkeypatch.setattr(environment, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(install.venv, "create", create)
    monkeypatch.setattr(install.subprocess, "run", run)
    assert install.install() == 0
    assert asked == [list(REQUIREMENTS.values()), *([wanted] for wanted in REQUIREMENTS.values())]
    error = capsys.readouterr().err.splitlines()
    assert error == [f"{REQUIREMENTS['fedjax']} cannot be installed, and will be left out"]
    (path,) = tmp_path.glob("peers/lib/*/site-packages/*.pth")
    assert path.read_text().strip().endswith("site-packages")
