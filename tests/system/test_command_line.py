"""Mistakes of a user end in one sentence and exit status 2, and leave no files; help, warnings and
the plan are printed as promised."""

import json
import os
import signal
import sys

import pytest
from binaries import call, one_sentence
from short_runs import check_other_devices

from experiments.building.config import Config
from experiments.building.job import build_plan
from experiments.launching import command_line, stopping
from experiments.launching.statuses import INTERRUPTED
from jaxlocal import ConfigurationError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "local_sdg"}, ["unknown method", "local_sgd"]),
        ({"dataset": "minst"}, ["unknown dataset", "mnist"]),
        ({"model": "resnet"}, ["unknown model", "resnet18_layer_norm"]),
        ({"period": "quadratc"}, ["unknown period", "quadratic"]),
        ({"optimizer": "adamv"}, ["unknown optimizer", "adamw"]),
        ({"schedule": "cosin"}, ["unknown schedule", "cosine"]),
        ({"partition": "sortd"}, ["unknown partition", "sorted"]),
        ({"worker_map": "vmp"}, ["unknown worker map", "vmap"]),
        *(
            ({"mesh": word}, ["HUBSxWORKERS", repr(word)])
            for word in ("2x", "0x2", "axb", "1x1x1x1")
        ),
        ({"optimizer_state": "keeep"}, ["unknown optimizer state", "keep"]),
        ({"rates": "slow"}, ["unknown rates", "slow_one"]),
        ({"rates": "0.5,x"}, ["--rates=0.5,x", "numbers"]),
        ({"rates": "0"}, ["(0, 1]", "got 0"]),
        ({"rates": "1.5"}, ["(0, 1]", "got 1.5"]),
        ({"rates": "0.5,0.5,0.5"}, ["3 rates", "8 workers"]),
        ({"worker_weights": "-1"}, ["> 0", "-1"]),
        ({"batch_size": 1000}, ["1000", "179"]),
        ({"workers": 7, "hubs": 2, "method": "mll_sgd"}, ["7 workers", "2 hubs"]),
        ({"hubs": 2}, ["local_sgd has no hubs", "--hubs=2"]),
        ({"method": "mll_sgd", "hubs": 4, "hub_graph": "circle"}, ["unknown hub graph", "ring"]),
        (
            {"method": "mll_sgd", "hubs": 8, "hub_graph": "erdos_renyi:0.1:1"},
            ["not connected", "parts"],
        ),
        ({"method": "mll_sgd", "hubs": 4, "period": "swap"}, ["swap", "τ = 4"]),
        ({"method": "swap", "period": "constant"}, ["'swap'", "constant"]),
        ({"method": "hl_sgd", "hubs": 4, "hub_graph": "ring"}, ["hl_sgd", "ring"]),
        ({"method": "cooperative_sgd", "hubs": 2}, ["8 workers", "--hubs=2"]),
        ({"steps": 0}, ["--steps", "got 0"]),
        (
            {"outer_learning_rate": 0.5},
            [
                "--outer_learning_rate=0.5",
                "slowmo, diloco, streaming_diloco, fedavgm, fedadam, sparse_loco",
            ],
        ),
        ({"method": "diloco", "outer_learning_rate": 0.0}, ["--outer_learning_rate", "got 0"]),
        ({"method": "slowmo", "outer_momentum": 1.0}, ["[0, 1)", "got 1"]),
        ({"method": "diloco", "outer_optimizer": "sdg"}, ["unknown optimizer", "sgd"]),
        (
            {"method": "diloco", "outer_optimizer": "adam", "outer_momentum": 0.5},
            ["--outer_momentum=0.5", "adam"],
        ),
        ({"method": "cser", "gradient_compressor": "gbrs:4"}, ["unknown compressor", "grbs"]),
        ({"method": "csre", "gradient_compressor": "grbs:4"}, ["unknown method", "cser"]),
        ({"method": "ef_sgd", "gradient_compressor": "grbs"}, ["grbs needs", "grbs:64"]),
        ({"method": "ef_sgd", "gradient_compressor": "grbs:0.5"}, ["0.5"]),
        ({"method": "ef_sgd", "gradient_compressor": "grbs:1e9"}, ["grbs:1000000000"]),
        ({"method": "ef_sgd", "gradient_compressor": "powersgd:1000"}, ["1000"]),
        ({"method": "cser_pl", "reset_compressor": "qsgd:9"}, ["9"]),
        (
            {"method": "cser", "sync_compressor": "grbs:4"},
            ["--sync_compressor=grbs:4", "cser", "--gradient_compressor and --reset_compressor"],
        ),
        (
            {"sync_compressor": "grbs:4"},
            ["--sync_compressor=grbs:4", "qsparse_local_sgd", "hl_sgd"],
        ),
        ({"cser_implementation": "2"}, ["--cser_implementation=2", "cser", "local_sgd"]),
        ({"method": "cser", "cser_implementation": "3"}, ["1, 2, released", "got 3"]),
        (
            {"method": "cser", "cser_implementation": "2", "gradient_compressor": "top_k:4"},
            ["top_k:4", "implementation"],
        ),
        (
            {"decay_outside_compressor": True},
            ["--decay_outside_compressor", "ef_sgd and qsparse_local_sgd", "local_sgd"],
        ),
        (
            {"method": "ef_sgd", "decay_outside_compressor": True},
            ["--decay_outside_compressor", "--weight_decay", "got 0"],
        ),
        (
            {
                **{"method": "ef_sgd", "decay_outside_compressor": True},
                **{"weight_decay": 0.1, "optimizer": "adam"},
            },
            ["--decay_outside_compressor", "sgd, nesterov, adamw, lion", "adam"],
        ),
        ({"fragments": 2}, ["--fragments=2", "streaming_diloco", "local_sgd"]),
        ({"method": "diloco", "delay_steps": 0}, ["--delay_steps=0", "streaming_diloco"]),
        ({"method": "streaming_diloco", "fragments": 0}, ["--fragments", "got 0"]),
        ({"method": "streaming_diloco", "model": "logistic", "fragments": 4}, ["2 tens", "4 frag"]),
        ({"method": "streaming_diloco", "delay_steps": -1}, ["--delay_steps", "got -1"]),
        ({"method": "streaming_diloco", "mixing_factor": 1.5}, ["[0, 1]", "got 1.5"]),
        (
            {"method": "streaming_diloco", "optimizer_state": "average"},
            ["--optimizer_state=average", "streaming_diloco"],
        ),
        ({"error_decay": 0.5}, ["--error_decay=0.5", "sparse_loco", "local_sgd"]),
        ({"method": "sparse_loco", "error_decay": 1.5}, ["[0, 1]", "got 1.5"]),
        ({"method": "cser", "optimizer_state": "reset"}, ["--optimizer_state=reset", "cser"]),
        ({"method": "csea", "period": "quadratic"}, ["'constant'", "quadratic"]),
        ({"accumulation": 3}, ["--accumulation=3", "--batch_size=16"]),
        ({"accumulation": 0}, ["--accumulation", "got 0"]),
        ({"precision": "bfloat"}, ["unknown precision", "bfloat16"]),
        ({"model_state": "reestimat"}, ["unknown model state option", "reestimate"]),
        ({"augment": "cropp"}, ["unknown augmentation", "crop"]),
        (
            {"augment": "flip", "dataset": "least_squares", "model": "linear"},
            ["--augment=flip", "(32,)"],
        ),
        ({"augment": "randaugment"}, ["--augment=randaugment", "--stream"]),
        ({"augment": "pca"}, ["PcaNoise(strength=0.1)", "3 channels, got 1"]),
        ({"partition": "by_distance"}, ["--partition=by_distance", "perceptron", "digits"]),
        ({"partition": "reused"}, ["reused:16", "'reused'"]),
        ({"keep": 0}, ["--keep", "got 0"]),
        ({"seeds": 0}, ["--seeds", "got 0"]),
        ({"checkpoint_every": -1}, ["--checkpoint_every", "got -1"]),
        ({"steps": 10, "rounds": 2}, ["--steps or --rounds", "10 and 2"]),
        ({"rounds": 2}, ["--rounds", "cosine"]),
        ({"learning_rate": float("nan")}, ["--learning_rate", "nan"]),
        ({"stop_train_loss": float("nan")}, ["--stop_train_loss", "nan"]),
        ({"momentum": 1.0}, ["--momentum", "1.0"]),
        ({"weight_decay": -1.0}, ["--weight_decay", "-1.0"]),
        ({"warmup_steps": 20, "steps": 10}, ["20 steps", "10"]),
        ({"seed": -1}, ["--seed", "-1"]),
        ({"seed": 1 << 64}, ["--seed", "2^32"]),
        ({"steps": 1 << 31}, ["--steps", "at most 10000000", "2147483648"]),
        ({"rounds": 10**30}, ["--rounds", "at most 1000000", "1" + "0" * 30]),
        ({"workers": 10**12}, ["--workers", "at most 1048576", "1000000000000"]),
        ({"hubs": 10**12, "method": "mll_sgd"}, ["--hubs", "at most 512", "1000000000000"]),
        ({"workers": 1025, "method": "cooperative_sgd"}, ["1025", "512 hubs"]),
        ({"batch_size": 10**12}, ["--batch_size", "at most 16777216", "1000000000000"]),
        (
            {"workers": 1 << 20, "batch_size": 100, "parameters": 1},
            ["--workers=1048576", "--batch_size=100", "67108864"],
        ),
        ({"local_steps": 1 << 31}, ["--local_steps", "at most 2147483647", "2147483648"]),
        (
            {"method": "mll_sgd", "local_steps": 10**9, "parameters": 1},
            ["1000000000 steps", "10000000"],
        ),
        ({"seeds": 10**9}, ["--seeds", "at most 1000", "1000000000"]),
        ({"stream_workers": 10**6}, ["--stream_workers", "at most 1024", "1000000"]),
        ({"parameters": 10**30}, ["--parameters", "at most 1000000000000"]),
        ({"workdir": "a\nb"}, ["--workdir", "printable", r"'a\nb'"]),
        ({"dataset": "\ud800"}, ["--dataset", "printable", r"\ud800"]),
        ({"warmup_steps": 500}, ["500 steps", "440"]),
        ({"hub_graph": "ring"}, ["local_sgd has no hub graph", "ring"]),
        ({"switch_step": 5}, ["--switch_step=5", "quadratic"]),
        ({"method": "swap", "switch_step": 20, "steps": 12}, ["--switch_step=20", "12 steps"]),
        ({"period_coefficient": -1.0}, ["≥ 0", "-1"]),
        ({"model": "linear"}, ["linear is a regression", "10 classes"]),
        ({"dataset": "two_quadratics", "model": "mlp", "workers": 2, "batch_size": 1}, ["linear"]),
        ({"dataset": "least_squares"}, ["mll_cnn"]),
        ({"parameters": 10, "worker_weights": "data"}, ["--worker_weights=data", "--parameters"]),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(changes, words):
    with pytest.raises(ConfigurationError) as error:
        build_plan(Config(**changes))
    sentence = str(error.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method=local_sdg"], "unknown method"),
        (["--no_such_flag=1"], "no_such_flag"),
        (["--learning_rate=fast"], "learning_rate"),
        (["stray"], "stray"),
        (["--flagfile=no_such_file"], "no_such_file"),
        (["--dataset=mnist", "--data_dir=nowhere"], "mnist is not prepared"),
        (["--parameters=10"], "and training needs one"),
        (["--method=ef_sgd", "--gradient_compressor=grbs:1e9"], "grbs:1000000000"),
        (["--method=cser", "--seeds=2", "--reset_compressor=powersgd:999"], "999"),
        (["--method=mll_sgd", "--local_steps=16", "--steps=100"], "96 or 112"),
        (["--mesh=3x1"], "1 hubs do not divide over 3 devices"),
        (["--mesh=axb"], "--mesh must be HUBSxWORKERS"),
        (["--rates=abc"], "unknown rates 'abc'"),
        (["--partition=iid:3"], "iid"),
        (["--seed=-1"], "--seed must be at least 0, got -1"),
        (["--steps=1e6"], "'1e6'"),
        (
            ["--coordinator_address=here:1", "--process_id=0", f"--process_count={10**12}"],
            "--process_count must be at most 65536, got 1000000000000",
        ),
    ],
)
def test_a_mistake_ends_with_status_two_and_leaves_nothing(flags, words, tmp_path):
    done = call("train", f"--workdir={tmp_path / 'run'}", *flags)
    assert done.status == 2
    assert one_sentence(done.error) and words in done.error
    assert not (tmp_path / "run").exists()


def test_a_warning_is_one_line():
    done = call(
        "plan",
        "--method=data_parallel",
        "--gradient_compressor=sign",
        "--steps=10",
        "--parameters=64",
    )
    assert done.status == 0
    assert done.error.startswith("warning: ") and "sign" in done.error
    assert len(done.error.strip().splitlines()) == 1 and ".py" not in done.error


def test_help_shows_every_flag_in_groups():
    done = call("train", "--help")
    assert done.status == 0
    for group in ("method:", "compression:", "workers:", "data:", "model:", "optimizer:", "run:"):
        assert f"\n{group}\n" in done.out
    for name in Config.__dataclass_fields__:
        assert f"--{name}:" in done.out
    assert "JAX_NUM_CPU_DEVICES" in done.out and "JAX_COMPILATION_CACHE_DIR" in done.out


def test_the_plan_prints_json_for_programs():
    done = call("plan", "--format=json", "--steps=100")
    figures = json.loads(done.out)
    assert done.status == 0 and figures["steps"] == 100 and figures["rounds"] > 0
    assert call("plan", "--format=jason").status == 2


def test_flags_txt_runs_again_on_more_devices_with_the_same_numbers(tmp_path):
    check_other_devices(tmp_path, lambda count, *flags: call("train", *flags, f"--mesh=1x{count}"))


class Interrupt:
    """An object in whose destructor Ctrl-C arrives: Python ignores what is raised there."""

    def __del__(self):
        raise stopping.Interrupted(signal.SIGINT)


def test_an_interrupt_that_python_ignores_ends_the_command(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(sys, "unraisablehook", command_line._handle_ignored)
    monkeypatch.setattr(os, "_exit", ended.append)
    Interrupt()
    assert ended == [INTERRUPTED] and capsys.readouterr().err == "error: interrupted\n"
