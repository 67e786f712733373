"""What a run trains: every method, datasets in memory or streamed, text, models with a state, other
precisions."""

import dataclasses
import math

import numpy as np
import pytest
from flax import nnx
from short_runs import SMALL, run, without_time

from experiments.building.config import Config
from experiments.building.job import build_job
from jaxlocal import ConfigurationError
from jaxlocal.data import text
from jaxlocal.models import MODELS, from_nnx

SHORT = dataclasses.replace(SMALL, eval_every=24, checkpoint_every=0)


def test_the_training_loss_may_be_over_a_fixed_sample(tmp_path):
    config = dataclasses.replace(SHORT, train_eval_examples=10)
    lines = run(config, tmp_path / "run")[1]
    job = build_job(config)
    examples = job.dataset.train()
    sample = np.random.default_rng(0).permutation(job.dataset.train_examples)[:10]
    # The model starts at 0.
    loss = 0.5 * np.mean(examples["targets"][sample].astype(np.float64) ** 2)
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
        checkpoint_every=0,
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
            SHORT, method=method, hubs=hubs, rates="0.9,1" if hubs == 2 else "0.9"
        )
        status, lines = run(config, tmp_path / method)
        assert status == 0 and lines[-1]["train_loss"] < lines[0]["train_loss"], method


@pytest.mark.slow
def test_every_compressed_method_trains(tmp_path):
    """At ratios that 32 parameters have room for, with workers that skip steps."""
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
        config = dataclasses.replace(SHORT, method=method, rates="0.9", **flags)
        status, lines = run(config, tmp_path / method)
        assert status == 0 and lines[-1]["train_loss"] < lines[0]["train_loss"], method
        models_sent = lines[-1]["bits_workers"] / (32 * 32)
        assert 0 < models_sent < 24, method  # fewer than in data parallelism


@pytest.mark.slow
def test_streaming_gives_the_numbers_of_the_resident_pool(tmp_path):
    """With augmented images, evaluations on samples, and threads or a process that reads."""
    config = Config(
        dataset="digits", model="logistic", workers=2, batch_size=4, steps=6, eval_every=3,
        augment="crop:1,flip,jitter:0.8", train_eval_examples=100, test_eval_examples=50,
        export=True, checkpoint_every=0,
    )  # fmt: skip
    ends = []
    for number, processes in enumerate((None, 0, 1)):
        flags = {} if processes is None else {"stream": True, "stream_workers": processes}
        folder = tmp_path / str(number)
        status, lines = run(dataclasses.replace(config, **flags), folder)
        assert status == 0
        model = (folder / "export" / "model.safetensors").read_bytes()
        ends.append((without_time(lines), model))
    assert ends[0] == ends[1] == ends[2]


TEXT = Config(
    dataset="docstrings:16", model="small_transformer", workers=2, batch_size=8, steps=8,
    optimizer="adamw", learning_rate=0.01, eval_every=8, train_eval_examples=64,
    test_eval_examples=64, method="diloco", checkpoint_every=0,
)  # fmt: skip


@pytest.fixture
def little_text(monkeypatch):
    """Some modules of Python's library: to parse all of them takes seconds."""
    modules = text._modules
    monkeypatch.setattr(text, "_modules", lambda folder: list(modules(folder))[::5])
    text._tokens.cache_clear()
    yield
    text._tokens.cache_clear()


@pytest.mark.slow
def test_text_is_learned(tmp_path, little_text):
    status, lines = run(TEXT, tmp_path / "run")
    assert status == 0
    # At the start all 97 characters are about equally likely.
    assert abs(lines[0]["eval_loss"] - math.log(97)) < 0.2
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.5
    assert lines[-1]["eval_accuracy"] > 0.1


def test_text_has_no_labels_and_needs_a_model_of_text(tmp_path, little_text):
    with pytest.raises(ConfigurationError, match=r"'sorted' needs one label.*16\]"):
        run(dataclasses.replace(TEXT, partition="sorted"), tmp_path / "sorted")
    with pytest.raises(ConfigurationError, match="mlp does not fit docstrings:16: outputs of"):
        run(dataclasses.replace(TEXT, model="mlp"), tmp_path / "mlp")
    assert not (tmp_path / "sorted").exists() and not (tmp_path / "mlp").exists()


class Normed(nnx.Module):
    """Logistic regression on normalised pixels, whose statistics are its state."""

    def __init__(self, outputs, rngs):
        self.norm = nnx.BatchNorm(64, momentum=0.99, rngs=rngs)
        self.logits = nnx.Linear(64, outputs, rngs=rngs)

    def __call__(self, images):
        return self.logits(self.norm(images.reshape(len(images), 64)))


@pytest.mark.slow
def test_model_states_are_kept_averaged_or_reestimated(tmp_path, monkeypatch):
    normed = lambda shape, outputs: from_nnx(lambda rngs: Normed(outputs, rngs))
    monkeypatch.setitem(MODELS, "normed", normed)
    config = Config(
        dataset="digits",
        model="normed",
        workers=2,
        steps=8,
        eval_every=8,
        augment="flip",
        checkpoint_every=0,
    )
    ends = {}
    for option in ("keep", "average", "reestimate"):
        chosen = dataclasses.replace(config, model_state=option)
        ends[option] = run(chosen, tmp_path / option)[1][-1]
    # With a memory of 100 steps, statistics of 8 steps are nearly the zeros and ones of the start.
    assert ends["reestimate"]["eval_loss"] < 0.95 * ends["keep"]["eval_loss"]
    bits = {option: end["bits_workers"] for option, end in ends.items()}
    assert bits["average"] - bits["keep"] == ends["keep"]["round"] * 32 * 2 * 64
    assert bits["reestimate"] == bits["keep"]
    np.testing.assert_allclose(ends["average"]["eval_loss"], ends["keep"]["eval_loss"], rtol=1e-3)


def test_precision_and_accumulation(tmp_path):
    config = Config(
        dataset="digits", model="logistic", workers=2, steps=6, eval_every=6, checkpoint_every=0
    )
    losses = {}
    for name, changes in {
        "plain": {},
        "parts": {"accumulation": 4},
        "half": {"precision": "bfloat16"},
    }.items():
        losses[name] = run(dataclasses.replace(config, **changes), tmp_path / name)[1][-1]
    plain, parts, half = (losses[name]["eval_loss"] for name in ("plain", "parts", "half"))
    np.testing.assert_allclose(parts, plain, rtol=1e-4)
    assert half != plain and abs(half - plain) < 0.05 * plain  # products have eight bits
    assert losses["half"]["bits_workers"] == losses["plain"]["bits_workers"]  # float32 is sent


def test_weights_can_follow_the_data():
    config = dataclasses.replace(
        SMALL, partition="unequal:0.1,0.2,0.3,0.4", worker_weights="data", batch_size=4
    )
    weight = build_job(config).layout.weight
    # Shards hold whole examples.
    np.testing.assert_allclose(weight, [[0.1, 0.2, 0.3, 0.4]], atol=1e-3)
