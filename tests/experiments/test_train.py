"""A run from its flags to its folder: what is written, that it can be run again, and what stops
it."""

import dataclasses
import json
import math

import numpy as np
import pytest
from flax import nnx

from experiments import train as binary
from experiments.build import build_job, make_round_fn
from experiments.command_line import FAILED, INTERRUPTED
from experiments.config import Config
from experiments.recording import (
    CHECKPOINTS,
    CURVES,
    FLAGS,
    METRICS,
    PREVIOUS,
    SUMMARY,
    TENSORBOARD,
    read_metrics,
)
from jaxlocal import ConfigurationError
from jaxlocal.models import MODELS, from_nnx

SMALL = Config(
    dataset="least_squares",
    model="linear",
    workers=4,
    batch_size=8,
    ticks=24,
    local_steps=2,
    momentum=0.0,
    eval_every=6,
)
KEYS = [
    *("tick", "round", "wall_seconds", "train_loss", "eval_loss", "eval_accuracy"),
    *("learning_rate", "local_steps", "consensus_distance", "bits_workers", "bits_hubs"),
]


def run(config, folder):
    status = binary.train(dataclasses.replace(config, workdir=str(folder)))
    return status, read_metrics(folder)


def without_time(lines):
    return [{key: value for key, value in line.items() if key != "wall_seconds"} for line in lines]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "run"
    return folder, run(SMALL, folder)


def test_a_run_leaves_its_files_and_a_line_per_measurement(small):
    folder, (status, lines) = small
    assert status == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [METRICS, SUMMARY, CURVES, FLAGS, CHECKPOINTS, TENSORBOARD]
    )
    assert [line["tick"] for line in lines] == [0, 6, 12, 18, 24]
    assert all(list(line) == KEYS for line in lines)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] / 2
    assert all(line["eval_accuracy"] is None for line in lines)
    assert (folder / CURVES).read_bytes().startswith(b"\x89PNG")


def test_the_counts_are_those_of_the_rounds(small):
    _, (_, lines) = small
    model_bits = 32 * 32  # 32 float32 parameters
    for line in lines:
        assert line["bits_workers"] == line["round"] * model_bits
        assert line["bits_hubs"] == 0
    assert lines[0]["round"] == 0 and lines[0]["consensus_distance"] == 0


def test_the_summary_tells_how_it_ended(small):
    folder, (_, lines) = small
    summary = json.loads((folder / SUMMARY).read_text())
    assert summary["ended"] == "finished"
    assert summary["train_loss"] == lines[-1]["train_loss"]
    assert summary["flags"] == (folder / FLAGS).read_text().splitlines()


def test_the_same_flags_give_the_same_numbers(small, tmp_path):
    _, (_, lines) = small
    assert without_time(run(SMALL, tmp_path / "again")[1]) == without_time(lines)


def test_another_seed_gives_other_numbers(small, tmp_path):
    _, (_, lines) = small
    other = run(dataclasses.replace(SMALL, seed=1), tmp_path / "other")[1]
    assert other[-1]["train_loss"] != lines[-1]["train_loss"]


def test_measuring_does_not_change_the_run(small, tmp_path):
    _, (_, lines) = small
    rare = run(dataclasses.replace(SMALL, eval_every=24), tmp_path / "rare")[1]
    assert rare[-1]["train_loss"] == lines[-1]["train_loss"]


def test_a_folder_of_other_flags_is_left_alone(small):
    folder, (_, lines) = small
    with pytest.raises(ConfigurationError, match="it has --batch_size=8, this one --batch_size=4"):
        run(dataclasses.replace(SMALL, batch_size=4), folder)
    assert read_metrics(folder) == lines


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / METRICS).write_text("mine\n")
    with pytest.raises(ConfigurationError, match="not a run"):
        run(SMALL, tmp_path)
    assert (tmp_path / METRICS).read_text() == "mine\n"


def test_a_workdir_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        run(SMALL, tmp_path / "file")


def test_training_stops_at_the_asked_loss(tmp_path):
    config = dataclasses.replace(SMALL, stop_train_loss=0.2, eval_every=1)
    status, lines = run(config, tmp_path / "run")
    assert status == 0
    assert lines[-1]["train_loss"] < 0.2 <= lines[-2]["train_loss"]
    assert "training loss" in json.loads((tmp_path / "run" / SUMMARY).read_text())["ended"]


def test_divergence_ends_the_run_and_keeps_what_was_measured(tmp_path):
    config = dataclasses.replace(SMALL, learning_rate=1e9, schedule="constant", ticks=60)
    status, lines = run(config, tmp_path / "run")
    ended = json.loads((tmp_path / "run" / SUMMARY).read_text())["ended"]
    assert status == FAILED
    assert lines[0]["tick"] == 0 and all(math.isfinite(line["train_loss"]) for line in lines)
    assert "worker" in ended and "tick" in ended
    assert (tmp_path / "run" / CURVES).exists()


def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    measure = binary.Measure.__call__

    def interrupted(self, step):
        if step.tick >= 12:
            raise KeyboardInterrupt
        return measure(self, step)

    monkeypatch.setattr(binary.Measure, "__call__", interrupted)
    status, lines = run(SMALL, tmp_path / "run")
    assert status == INTERRUPTED
    assert [line["tick"] for line in lines] == [0, 6]
    assert json.loads((tmp_path / "run" / SUMMARY).read_text())["ended"] == "interrupted"


def test_the_training_loss_may_be_over_a_fixed_sample(tmp_path):
    config = dataclasses.replace(SMALL, train_eval_examples=10)
    lines = run(config, tmp_path / "run")[1]
    job = build_job(config)
    examples = job.dataset.train()
    sample = np.random.default_rng(0).permutation(job.dataset.train_examples)[:10]
    loss = 0.5 * np.mean(
        examples["targets"][sample].astype(np.float64) ** 2
    )  # the model starts at 0
    np.testing.assert_allclose(lines[0]["train_loss"], loss, rtol=1e-6)


def test_two_quadratics_follow_their_closed_form(tmp_path):
    """F(x_R) at R = 100, K = 4, η = 0.1; methods of Qin, Etesami, Uribe, TMLR 2024."""
    rounds, local_steps, rate = 100, 4, 0.1
    config = Config(
        dataset="two_quadratics:100",
        model="linear",
        partition="sorted",
        workers=2,
        batch_size=1,
        period="constant",
        local_steps=local_steps,
        rounds=rounds,
        momentum=0.0,
        learning_rate=rate,
        schedule="constant",
        eval_every=400,
    )
    lines = run(config, tmp_path / "run")[1]
    gap = 1 / (rounds + 0.5)
    shrink = 1 - (1 - (1 - rate) ** local_steps) * gap / 2
    np.testing.assert_allclose(lines[-1]["train_loss"], gap / 4 * shrink ** (2 * rounds), rtol=1e-3)


def test_every_method_trains(tmp_path):
    for method in (
        "data_parallel",
        "post_local_sgd",
        "swap",
        "mll_sgd",
        "hl_sgd",
        "cooperative_sgd",
        "slowmo",
        "diloco",
    ):
        hubs = 2 if method in ("mll_sgd", "hl_sgd") else 1
        config = dataclasses.replace(
            SMALL, method=method, hubs=hubs, rates="0.9,1" if hubs == 2 else "0.9"
        )
        status, lines = run(config, tmp_path / method)
        assert status == 0 and lines[-1]["train_loss"] < lines[0]["train_loss"], method


def test_every_compressed_method_trains(tmp_path):
    """At ratios that 32 parameters have room for, with workers that skip ticks."""
    small = {
        "ef_sgd": {"gradient_compressor": "grbs:4"},
        "qsparse_local_sgd": {"sync_compressor": "top_k:4+int8"},
        "cser": {"gradient_compressor": "grbs:8", "reset_compressor": "grbs:2"},
        "cser_pl": {"reset_compressor": "grbs:4", "period": "quadratic"},
        "sparse_loco": {"sync_compressor": "top_k:4", "error_decay": 0.9},
        "data_parallel": {"gradient_compressor": "qsgd:4"},
        "hl_sgd": {"sync_compressor": "bfloat16", "hubs": 2},
    }
    for method, flags in small.items():
        config = dataclasses.replace(SMALL, method=method, rates="0.9", **flags)
        status, lines = run(config, tmp_path / method)
        assert status == 0 and lines[-1]["train_loss"] < lines[0]["train_loss"], method
        ticks_said = lines[-1]["bits_workers"] / (32 * 32)
        assert 0 < ticks_said < 24, method  # less than data parallelism says


def test_a_compressed_run_that_is_cut_ends_with_the_same_numbers(tmp_path, monkeypatch):
    """Anchor, errors and the masks' keys are in a checkpoint."""
    config = dataclasses.replace(
        SMALL, method="qsparse_local_sgd", sync_compressor="random_k:4", checkpoint_every=6
    )
    whole = run(config, tmp_path / "whole")[1]
    measure = binary.Measure.__call__

    def interrupted(self, step):
        if step.tick >= 18:
            raise KeyboardInterrupt
        return measure(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(binary.Measure, "__call__", interrupted)
        assert run(config, tmp_path / "cut")[0] == INTERRUPTED
    status, lines = run(config, tmp_path / "cut")
    assert status == 0 and without_time(lines) == without_time(whole)


def tensorboard(folder):
    """Every scalar by tag and step, as TensorBoard's own records have them."""
    from tensorboardX.proto import event_pb2

    scalars = {}
    for path in folder.iterdir():
        data, place = path.read_bytes(), 0
        while place < len(data):  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[place : place + 8], "little")
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + size])
            place += 16 + size
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def test_tensorboard_has_the_measurements(small):
    folder, (_, lines) = small
    scalars = tensorboard(folder / TENSORBOARD)
    for name in ("train_loss", "eval_loss", "learning_rate", "bits_workers"):
        expected = [(line["tick"], pytest.approx(line[name], rel=1e-6)) for line in lines]
        assert scalars[name] == expected
    assert "eval_accuracy" not in scalars  # a regression has none


def test_streaming_gives_the_numbers_of_the_resident_pool(tmp_path):
    """Images, augmented, of which an evaluation takes a sample; by threads and by processes."""
    config = Config(
        dataset="digits", model="logistic", workers=2, batch_size=4, ticks=6, eval_every=3,
        augment="crop:1,flip", train_eval_examples=100, test_eval_examples=50, export=True,
    )  # fmt: skip
    ends = []
    for number, stream in enumerate((None, 0, 1)):
        folder = tmp_path / str(number)
        streamed = {} if stream is None else {"stream": True, "stream_workers": stream}
        status, lines = run(dataclasses.replace(config, **streamed), folder)
        assert status == 0
        model = (folder / "export" / "model.safetensors").read_bytes()
        ends.append((without_time(lines), model))
    assert ends[0] == ends[1] == ends[2]


def test_text_is_learned_and_has_no_labels_to_go_by(tmp_path):
    config = Config(
        dataset="docstrings:16", model="small_transformer", workers=2, batch_size=8, ticks=8,
        optimizer="adamw", learning_rate=0.01, eval_every=8, train_eval_examples=64,
        test_eval_examples=64, method="diloco",
    )  # fmt: skip
    status, lines = run(config, tmp_path / "run")
    assert status == 0
    assert abs(lines[0]["eval_loss"] - math.log(97)) < 0.2  # nothing is known of 97 characters
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.5
    assert lines[-1]["eval_accuracy"] > 0.1
    with pytest.raises(ConfigurationError, match=r"'sorted' goes by one label.*16\]"):
        run(dataclasses.replace(config, partition="sorted"), tmp_path / "sorted")
    with pytest.raises(ConfigurationError, match="mlp does not fit docstrings:16: outputs of"):
        run(dataclasses.replace(config, model="mlp"), tmp_path / "mlp")
    assert not (tmp_path / "sorted").exists() and not (tmp_path / "mlp").exists()


class Normed(nnx.Module):
    """Logistic regression on normalised pixels, of which statistics are what it keeps."""

    def __init__(self, outputs, rngs):
        self.norm = nnx.BatchNorm(64, momentum=0.99, rngs=rngs)
        self.logits = nnx.Linear(64, outputs, rngs=rngs)

    def __call__(self, images):
        return self.logits(self.norm(images.reshape(len(images), 64)))


def test_model_states_are_kept_averaged_or_estimated_anew(tmp_path, monkeypatch):
    normed = lambda shape, outputs: from_nnx(lambda rngs: Normed(outputs, rngs))
    monkeypatch.setitem(MODELS, "normed", normed)
    config = Config(
        dataset="digits", model="normed", workers=2, ticks=8, eval_every=8, augment="flip"
    )
    ends = {}
    for option in ("keep", "average", "reestimate"):
        chosen = dataclasses.replace(config, model_state=option)
        ends[option] = run(chosen, tmp_path / option)[1][-1]
    # With a memory of 100 ticks, statistics of 8 ticks are nearly the zeros and ones of the start.
    assert ends["reestimate"]["eval_loss"] < 0.95 * ends["keep"]["eval_loss"]
    said = {option: end["bits_workers"] for option, end in ends.items()}
    assert said["average"] - said["keep"] == ends["keep"]["round"] * 32 * 2 * 64
    assert said["reestimate"] == said["keep"]
    np.testing.assert_allclose(ends["average"]["eval_loss"], ends["keep"]["eval_loss"], rtol=1e-3)


def test_precision_and_accumulation(tmp_path):
    config = Config(dataset="digits", model="mlp", workers=2, ticks=6, eval_every=6)
    losses = {}
    for name, changes in {
        "plain": {},
        "parts": {"accumulation": 4},
        "half": {"precision": "bfloat16"},
    }.items():
        losses[name] = run(dataclasses.replace(config, **changes), tmp_path / name)[1][-1]
    plain, parts, half = (losses[name]["eval_loss"] for name in ("plain", "parts", "half"))
    np.testing.assert_allclose(parts, plain, rtol=1e-4)
    assert half != plain and abs(half - plain) < 0.05 * plain  # eight bits of every product
    assert losses["half"]["bits_workers"] == losses["plain"]["bits_workers"]  # float32 is said


def test_weights_can_follow_the_data():
    config = dataclasses.replace(
        SMALL, partition="unequal:0.1,0.2,0.3,0.4", worker_weights="data", batch_size=4
    )
    weight = build_job(config).layout.weight
    np.testing.assert_allclose(
        weight, [[0.1, 0.2, 0.3, 0.4]], atol=1e-3
    )  # shards are whole examples


def test_index_batches_stay_small():
    assert make_round_fn(build_job(SMALL)).chunks(10_000).__next__() == 256


def test_a_run_whose_last_step_diverges_has_failed(tmp_path):
    config = dataclasses.replace(SMALL, ticks=1, learning_rate=1e30, eval_every=1)
    status, lines = run(config, tmp_path / "run")
    assert status == FAILED and lines[-1]["train_loss"] is None
    assert "average model's loss" in json.loads((tmp_path / "run" / SUMMARY).read_text())["ended"]


def test_an_interrupted_rerun_keeps_the_metrics_it_was_to_replace(tmp_path, monkeypatch):
    unsaved = dataclasses.replace(SMALL, checkpoint_every=0)
    run(unsaved, tmp_path / "run")
    before = (tmp_path / "run" / METRICS).read_text()

    def interrupted(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(binary.Measure, "__call__", interrupted)
    binary.train(dataclasses.replace(unsaved, workdir=str(tmp_path / "run")))
    assert (tmp_path / "run" / PREVIOUS).read_text() == before
