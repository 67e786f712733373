"""Tuning: every setting runs at its best learning rate, with seeds on which it was not tuned."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.building.config import Config
from experiments.building.job import build_plan
from experiments.launching.statuses import INTERRUPTED
from experiments.planning.figures import plan_figures
from experiments.running.recording import SUMMARY
from experiments.tuning import runs
from experiments.tuning.results import markdown
from experiments.tuning.search import RESULTS, TABLE, tune
from experiments.tuning.settings import read_settings
from jaxlocal import ConfigurationError

PRESETS = Path(__file__).parents[2] / "experiments" / "presets"
BASE = Config(
    dataset="least_squares", model="linear", workers=2, batch_size=8, steps=8, momentum=0.0,
    eval_every=8, checkpoint_every=0, schedule="constant", seeds=2,
)  # fmt: skip
SETTINGS = """
# two settings
local: --method=local_sgd --period=constant --local_steps=4
cser_pl: --method=cser_pl --local_steps=2 --reset_compressor=grbs:8  # 16 times less
"""
RATES = [0.001, 0.05, 1e30]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    (folder / "two.settings").write_text(SETTINGS)
    base = dataclasses.replace(BASE, workdir=str(folder / "runs"))
    assert tune(base, folder / "two.settings", RATES) == 0
    return folder, base, json.loads((folder / "runs" / RESULTS).read_text())


def test_the_best_learning_rate_runs_with_the_next_seeds(tuned):
    folder, _, results = tuned
    assert list(results["settings"]) == ["local", "cser_pl"]
    for name, figures in results["settings"].items():
        tried = figures["tuning"]
        assert [t["learning_rate"] for t in tried] == RATES
        assert tried[2]["ended"].startswith("diverged")
        assert tried[1]["eval_loss"] < tried[0]["eval_loss"]
        assert figures["best_learning_rate"] == 0.05 and not figures["at_edge"]
        assert [run["seed"] for run in figures["runs"]] == [1, 2]
        summaries = [folder / "runs" / name / f"seed_{seed}" / SUMMARY for seed in (1, 2)]
        losses = [json.loads(path.read_text())["eval_loss"] for path in summaries]
        assert figures["eval_loss"]["mean"] == pytest.approx(sum(losses) / 2)
        assert figures["eval_loss"]["error"] == pytest.approx(abs(losses[0] - losses[1]) / 2)


def test_the_table_shows_the_bits_that_were_sent(tuned):
    folder, _, results = tuned
    lines = (folder / "runs" / TABLE).read_text().splitlines()
    assert len(lines) == 4 and "test loss" in lines[0]
    local, cser_pl = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert local[:4] == ["local", "4", "4", "0.05"]  # R_C = H: all 32 parameters are sent
    assert cser_pl[:2] == ["cser_pl", "16"]
    # Two averages of 32 float32 values in 8 steps.
    assert results["settings"]["local"]["bits_workers"] == 2 * 32 * 32
    assert local[6] == f"{2 * 32 * 32 / 8e6:.4g}"
    assert "±" in local[4] and "±" in local[5]


def test_only_a_run_that_has_not_ended_is_run_again(tuned, monkeypatch, capsys):
    folder, base, results = tuned
    stopped = folder / "runs" / "cser_pl" / "seed_2"
    (stopped / SUMMARY).unlink()
    trained = []
    train = runs.train
    monkeypatch.setattr(runs, "train", lambda one: trained.append(one.workdir) or train(one))
    assert tune(base, folder / "two.settings", RATES) == 0
    assert trained == [str(stopped)]
    again = json.loads((folder / "runs" / RESULTS).read_text())
    for name in ("local", "cser_pl"):
        assert again["settings"][name]["eval_loss"] == results["settings"][name]["eval_loss"]
    assert "| cser_pl |" in capsys.readouterr().out


def test_runs_with_other_flags_are_refused(tuned):
    folder, base, _ = tuned
    with pytest.raises(ConfigurationError, match="other flags"):
        tune(dataclasses.replace(base, steps=16), folder / "two.settings", RATES)


def test_an_interrupted_run_ends_the_tuning(tmp_path, monkeypatch, capsys):
    (tmp_path / "one.settings").write_text("one: --local_steps=2")
    monkeypatch.setattr(runs, "train", lambda one: INTERRUPTED)
    base = dataclasses.replace(BASE, workdir=str(tmp_path / "runs"))
    assert tune(base, tmp_path / "one.settings", [0.1]) == INTERRUPTED
    assert "stopped, see" in capsys.readouterr().err
    assert not (tmp_path / "runs" / RESULTS).exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no setting"]),
        ("local --method=local_sgd", ["line 1", "NAME: --flag=value"]),
        ("../out: --method=local_sgd", ["line 1"]),
        ("a: --local_steps=2\na: --local_steps=4", ["two settings named a", "line 2"]),
        ("a: --methud=cser", ["setting a", "methud"]),
        ("a: cser", ["setting a", "'cser'"]),
        ("a: --learning_rate=0.1", ["setting a", "--learning_rate=0.1", "same for all"]),
    ],
)
def test_a_settings_file_that_is_wrong_is_refused(text, words, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ConfigurationError) as error:
        read_settings(tmp_path / "file", BASE)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_setting_that_does_not_fit_is_refused_before_the_first_run(tmp_path):
    base = dataclasses.replace(BASE, workdir=str(tmp_path / "runs"))
    wrong = "good: --local_steps=2\nbad: --method=cser --gradient_compressor=grbs:1000"
    (tmp_path / "file").write_text(wrong)
    with pytest.raises(ConfigurationError, match="setting bad: .*1000"):
        tune(base, tmp_path / "file", [0.1])
    (tmp_path / "file").write_text("good: --local_steps=2")
    for wrong, words in [
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"seeds": 1001}, "--seeds must be at most 1000, got 1001"),
        ({"process_count": 2}, "a search is one process, and --process_count=2 was given"),
        ({"distributed": True}, "a search is one process, and --distributed=True was given"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            tune(dataclasses.replace(base, **wrong), tmp_path / "file", [0.1])
    with pytest.raises(ConfigurationError, match="--learning_rate must be a number > 0, got -1"):
        tune(base, tmp_path / "file", [0.1, -1.0])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        tune(base, tmp_path / "nothing", [0.1])
    assert not (tmp_path / "runs").exists()


def test_the_table_shows_edges_and_divergence():
    figures = {
        "compression_ratio_formula": None,
        "compression_ratio_counted": 1.5,
        "bits_workers": 8_000_000,
        "best_learning_rate": 0.1,
        "at_edge": True,
        "eval_accuracy": {"mean": 0.9, "error": 0.01},
        "train_loss": {"mean": 0.5, "error": None},
        "diverged": 1,
        "runs": [{}, {}],
    }
    lost = {name: figures[name] for name in list(figures)[:3]}
    lost |= {"best_learning_rate": None, "at_edge": False, "diverged": 0, "runs": []}
    rows = markdown({"a": figures, "b": lost}).splitlines()[2:]
    assert (
        rows[0] == "| a | — | 1.5 | 0.1 (edge) | 0.9000 ± 0.0100 (1 of 2 diverged) | 0.5000 | 1 |"
    )
    assert rows[1] == "| b | — | 1.5 | — | diverged | diverged | 1 |"


@pytest.mark.parametrize(("name", "count"), [("compressed_mnist", 16), ("compressed_cifar10", 3)])
def test_the_presets_have_the_ratio_of_their_names(name, count):
    settings = read_settings(PRESETS / f"{name}.settings", Config(steps=512, parameters=1 << 20))
    assert len(settings) == count
    for setting, config in settings.items():
        ratio = plan_figures(build_plan(config))["compression_ratio_formula"]
        assert ratio == (1 if setting == "data_parallel" else int(setting.rpartition("_")[2]))
