"""EMA and SWA of a run are measured beside its model, saved, resumed to the bit and exported."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file
from short_runs import SMALL, run, saved_steps, without_time

from experiments.building.config import Config
from experiments.building.job import build_job, build_plan
from experiments.comparing.reading import load_runs
from experiments.plotting.display import Display
from experiments.running.recording import CURVES, METRICS, SUMMARY, read_metrics
from experiments.running.training import train
from jaxlocal import ConfigurationError

# 3, 6, 9 … steps end rounds; measurements and checkpoints lie within rounds too.
AVERAGED = dataclasses.replace(
    SMALL,
    period="constant",
    local_steps=3,
    ema_decay=0.8,
    swa_start=10,
    eval_every=8,
    checkpoint_every=4,
    export=True,
    keep=10,
)


class Crash(BaseException):
    """An error that no program catches."""


def without_averages(lines):
    return [{k: v for k, v in line.items() if not k.endswith(("_ema", "_swa"))} for line in lines]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged") / "run"
    status, lines = run(AVERAGED, folder)
    assert status == 0
    return folder, lines


def exported(folder, name):
    (weights,) = load_file(folder / "export" / name / "model.safetensors").values()
    return weights[:, 0]


def test_training_is_the_same_without_them(ended, tmp_path):
    plain = dataclasses.replace(AVERAGED, ema_decay=None, swa_start=None)
    _, lines = run(plain, tmp_path / "run")
    assert without_averages(without_time(ended[1])) == without_time(lines)
    np.testing.assert_array_equal(exported(ended[0], "."), exported(tmp_path / "run", "."))


def test_the_averages_that_are_measured_and_exported_are_those_of_the_models(ended, tmp_path):
    models = {}  # after every round, as shorter runs export them: the learning rate is constant
    config = dataclasses.replace(AVERAGED, schedule="constant", eval_every=0)
    whole = dataclasses.replace(config, steps=18)
    _, lines = run(whole, tmp_path / "whole")
    for steps in (12, 15, 18):
        part = dataclasses.replace(whole, steps=steps, ema_decay=None, swa_start=None)
        run(part, tmp_path / str(steps))
        models[steps] = exported(tmp_path / str(steps), ".").astype(np.float64)
    # From step 10 on: two steps with the model of 12, three with each of the others.
    expected = (2 * models[12] + 3 * models[15] + 3 * models[18]) / 8
    found = exported(tmp_path / "whole", "swa")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    data = build_job(whole).dataset.test()
    loss = 0.5 * np.mean((data["inputs"].astype(np.float64) @ found - data["targets"]) ** 2)
    np.testing.assert_allclose(lines[-1]["eval_loss_swa"], loss, rtol=1e-5)
    assert lines[-1]["eval_loss_swa"] != lines[-1]["eval_loss"] != lines[-1]["eval_loss_ema"]
    until = [line for line in lines if line["step"] <= 9]
    assert all(line["eval_loss_swa"] == line["eval_loss"] for line in until)


def test_they_are_in_the_summary_the_table_and_the_picture(ended, capsys):
    folder, lines = ended
    summary = json.loads((folder / SUMMARY).read_text())
    assert summary["eval_loss_ema"] == lines[-1]["eval_loss_ema"]
    assert summary["eval_accuracy_swa"] is None  # a regression
    assert (folder / CURVES).read_bytes().startswith(b"\x89PNG")
    run(AVERAGED, folder)  # has ended, and is shown again
    assert re.search(r"test loss, accuracy: EMA +[\d.]+, —", capsys.readouterr().out)


@pytest.mark.parametrize("step", [pytest.param(8, marks=pytest.mark.slow), 16])
def test_a_run_that_was_killed_ends_with_the_same_averages(ended, tmp_path, monkeypatch, step):
    def crash(self, now, measured):
        if now.step > step:
            raise Crash

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Display, "show", crash)
        with pytest.raises(Crash):
            train(dataclasses.replace(AVERAGED, workdir=str(folder)))
    assert saved_steps(folder)[-1] == step
    assert without_time(run(AVERAGED, folder)[1]) == without_time(ended[1])
    for name in (".", "ema", "swa"):
        np.testing.assert_array_equal(exported(folder, name), exported(ended[0], name))


def test_a_comparison_has_them_as_runs_of_their_own(ended):
    model, *averages = load_runs([ended[0]])
    assert [run.label for run in averages] == [f"{model.label}: {name}" for name in ("EMA", "SWA")]
    assert averages[0].mean("eval_loss")[-1] == ended[1][-1]["eval_loss_ema"]
    assert averages[1].mean("bits_workers")[-1] == model.mean("bits_workers")[-1]
    assert np.isnan(averages[0].mean("train_loss")).all()  # it is not measured


@pytest.mark.parametrize("damage", [r'\1"low",', ""])
def test_damaged_measurements_of_them_are_told(ended, tmp_path, damage):
    text = (ended[0] / METRICS).read_text()
    (tmp_path / METRICS).write_text(re.sub(r'("eval_loss_ema": )[^,]*,', damage, text))
    with pytest.raises(ConfigurationError, match="line 1 is not a measurement"):
        read_metrics(tmp_path)


def test_several_seeds_have_means_of_them(tmp_path, capsys):
    config = dataclasses.replace(AVERAGED, steps=12, seeds=2, checkpoint_every=0, export=False)
    assert train(dataclasses.replace(config, workdir=str(tmp_path / "run"))) == 0
    summary = json.loads((tmp_path / "run" / SUMMARY).read_text())
    each = [read_metrics(tmp_path / "run" / f"seed_{n}")[-1]["eval_loss_ema"] for n in (0, 1)]
    assert summary["eval_loss_ema"]["mean"] == pytest.approx(np.mean(each))
    assert "eval loss ema" in capsys.readouterr().out


def test_a_plan_counts_their_memory_and_no_message():
    flags = {"method": "mll_sgd", "hubs": 2, "local_steps": 3, "period": None}
    config = dataclasses.replace(AVERAGED, **flags)
    plan = build_plan(config)
    plain = build_plan(dataclasses.replace(config, ema_decay=None, swa_start=None))
    count = lambda p: len(
        p.method.inner.communication(p.state) + p.method.outer.communication(p.state)
    )
    assert count(plan) == count(plain)
    (kept,) = plan.state.memory.outer[-1]
    assert set(kept.stacked) == {"ema", "swa"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ema_decay": 1.0}, "--ema_decay must be in (0, 1), got 1.0"),
        ({"ema_decay": float("nan")}, "--ema_decay must be in (0, 1), got nan"),
        ({"swa_start": 24}, "--swa_start must be a step of the run, from 0 to 23, got 24"),
        ({"swa_start": -1}, "--swa_start must be a step of the run, from 0 to 23, got -1"),
    ],
)
def test_values_out_of_range_are_refused(changes, sentence):
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        build_plan(dataclasses.replace(SMALL, **changes))


@pytest.mark.slow
def test_batch_statistics_are_estimated_on_the_averages(tmp_path):
    """With statistics of the workers' models, those of an average would be of other activations."""
    config = Config(
        model="small_resnet_batch_norm",
        workers=2,
        batch_size=8,
        steps=12,
        local_steps=2,
        learning_rate=0.2,
        ema_decay=0.5,
        swa_start=0,
        eval_every=12,
        checkpoint_every=0,
        train_eval_examples=64,
        test_eval_examples=256,
    )
    estimated = dataclasses.replace(config, model_state="reestimate")
    (_, kept), (_, ours) = (run(c, tmp_path / c.model_state) for c in (config, estimated))
    for name in ("eval_loss_ema", "eval_loss_swa"):
        assert kept[-1][name] == ours[-1][name]
    assert kept[-1]["eval_loss"] != ours[-1]["eval_loss"]
    # Before training the average is the model, and statistics are those of the first batches.
    assert ours[0]["eval_loss_ema"] == ours[0]["eval_loss"] == kept[0]["eval_loss_ema"]
