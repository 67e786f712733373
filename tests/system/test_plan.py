"""A plan has the numbers of the run that it predicts, and those that the papers published."""

import dataclasses
import time
from pathlib import Path

import pytest
import reference_periods
from absl import flags
from short_runs import SMALL, run

from experiments.building.config import Config, default_workdir
from experiments.building.job import build_plan, make_round_fn, measure_every
from experiments.building.schedules import make_period
from experiments.launching import command_line
from experiments.planning.figures import plan_figures
from experiments.running.recording import finite
from jaxlocal import ConfigurationError
from jaxlocal.training.loop import dispatches

SMALL_RATIOS = {  # which fit 32 parameters
    "cser": {"gradient_compressor": "grbs:16", "reset_compressor": "grbs:4"},
    "sparse_loco": {"sync_compressor": "top_k:8"},
    "streaming_diloco": {"fragments": 1},
}
PRESETS = Path(__file__).parents[2] / "experiments" / "presets"


def preset(name, **changes):
    values = flags.FlagValues()
    command_line.define_flags(values)
    values([name, f"--flagfile={PRESETS / name}"])
    return dataclasses.replace(command_line.from_flags(values), **changes)


@pytest.mark.parametrize(
    ("name", "changes", "volume"),
    [
        # Gu et al., ICLR 2024: communication in per cent of data parallel, to their digits
        ("qsr_vit_b.flags", {}, 10.4),
        ("qsr_vit_b.flags", {"local_steps": 8}, 6.9),
        ("qsr_resnet152.flags", {}, 20.1),
        ("qsr_resnet152.flags", {"local_steps": 2, "period_coefficient": 0.2}, 39.7),
        ("qsr_vit_b.flags", {"period": "constant"}, 25.0),
    ],
)
def test_the_published_volumes_of_qsr(name, changes, volume):
    figures = plan_figures(build_plan(preset(name, **changes)))
    assert round(100 * figures["rounds"] / figures["steps"], 1) == volume


def test_the_vit_plan_equals_the_reference_rule_round_by_round():
    figures = plan_figures(build_plan(preset("qsr_vit_b.flags")))
    rate = reference_periods.schedule("cosine", 0.008, 93_600, 10_000)
    expected = reference_periods.qsr(rate, 93_600, 0.0175, 4, warmup_steps=10_000)
    lengths = [s["local_steps"] for s in figures["local_steps"] for _ in range(s["rounds"])]
    assert lengths == expected


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "step", "cosine_step"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedules_equal_the_reference(kind, warmup):
    config = Config(schedule=kind, warmup_steps=warmup, steps=90, learning_rate=0.4)
    ours = build_plan(config).learning_rate
    theirs = reference_periods.schedule(kind, 0.4, 90, warmup)
    assert [ours(t) for t in range(91)] == pytest.approx([theirs(t) for t in range(91)], rel=1e-9)


@pytest.mark.parametrize(
    "method",
    ["local_sgd", "mll_sgd", "cooperative_sgd", "data_parallel", "cser", "sparse_loco"]
    + ["streaming_diloco"],
)
def test_a_run_has_the_planned_rounds_and_bits(method, tmp_path):
    config = dataclasses.replace(
        SMALL,
        method=method,
        hubs=2 if method == "mll_sgd" else 1,
        hub_period=2,
        steps=48,
        local_steps=4,
        eval_every=12,
        checkpoint_every=0,
        **SMALL_RATIOS.get(method, {}),
    )
    figures = plan_figures(build_plan(config))
    last = run(config, tmp_path / "run")[1][-1]
    for name, planned in [("round", "rounds"), ("step", "steps")]:
        assert last[name] == figures[planned]
    assert last["bits_workers"] == figures["bits_workers"]
    assert last["bits_hubs"] == figures["bits_hubs"]


def test_a_mesh_changes_the_memory_of_a_device_and_not_the_run():
    config = Config(parameters=1 << 12, workers=2, optimizer="adam", mesh="1x2x4")
    figures = plan_figures(build_plan(config))
    assert figures["mesh"] == {"hubs": 1, "workers": 2, "model": 4} and figures["devices"] == 8
    memory = figures["memory_bytes"]  # float32: a quarter of one worker's; the count is whole
    assert (memory["parameters"], memory["optimizer"]) == (1 << 12, (2 << 12) + 4)
    assert default_workdir(config) == default_workdir(dataclasses.replace(config, mesh=None))
    for mesh, words in [("1x3", "2 workers do not divide over 3"), ("1x2x8", "16 devices")]:
        with pytest.raises(ConfigurationError, match=words):
            plan_figures(build_plan(dataclasses.replace(config, mesh=mesh)))


def h_at(rate, period, **options):
    """H by the default coefficient at a learning rate, of a run whose peak is 0.3."""
    config = Config(period=period, learning_rate=0.3, **options)
    return make_period(config, lambda step: rate, 10**6).length(0, 10**6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("base", [1, 2, 4, 7])
@pytest.mark.parametrize("period", ["linear", "quadratic", "cubic"])
def test_the_default_coefficient_gives_h_base_at_the_peak(period, base, optimizer):
    assert h_at(0.3, period, local_steps=base, optimizer=optimizer) == base


@pytest.mark.parametrize(
    ("optimizer", "base", "ratio"),
    [("sgd", 4, 0.25), ("nesterov", 16, 0.25), ("adamw", 4, 2.2), ("lion", 8, 2.2), ("adam", 1, 1)],
)
def test_h_grows_from_the_same_learning_rate_by_all_default_coefficients(optimizer, base, ratio):
    options = {"local_steps": base, "optimizer": optimizer}
    start = 0.3 * ratio / (base + 1) ** 0.5  # where (α/η)² = H_base + 1
    for period in ("linear", "quadratic", "cubic"):
        assert h_at(1.0001 * start, period, **options) == base
        assert h_at(0.9999 * start, period, **options) == base + 1


def test_fragments_take_turns_in_a_period():
    options = {"method": "streaming_diloco", "model": "mlp", "local_steps": 8, "fragments": 4}
    figures = plan_figures(build_plan(Config(**options, rounds=12)))
    assert figures["local_steps"] == [{"step": 0, "local_steps": 2, "rounds": 12}]
    assert figures["steps"] == 24 and figures["bits_workers"] == 3 * figures["bits_model"]
    assert figures["communication_volume"] == 1 / 8 and figures["compression_ratio_formula"] == 8
    # The last round of one step is no longer than the delay.
    figures = plan_figures(build_plan(Config(**options, steps=25)))
    assert [(s["local_steps"], s["rounds"]) for s in figures["local_steps"]] == [(2, 11), (3, 1)]
    rising = plan_figures(build_plan(Config(**options, steps=400, period="quadratic")))
    assert all(s["local_steps"] > 1 for s in rising["local_steps"]) and rising["rounds"] < 200
    for wrong, words in [
        ({"fragments": 3}, "8 steps does not divide into 3 rounds"),
        ({"delay_steps": 2}, "H = 2 is too short"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            plan_figures(build_plan(Config(**{**options, **wrong})))


def test_rounds_count_steps_where_h_does_not_follow_a_schedule():
    config = Config(period="constant", local_steps=4, rounds=10)
    assert plan_figures(build_plan(config))["steps"] == 40
    config = Config(method="post_local_sgd", switch_step=5, local_steps=4, rounds=10)
    assert plan_figures(build_plan(config))["steps"] == 5 + 4 * 5


def test_the_paper_graph_is_a_file_of_rows():
    config = Config(
        method="mll_sgd",
        workers=20,
        hubs=10,
        batch_size=8,
        hub_graph=str(PRESETS / "mll_ten_hubs.graph"),
    )
    assert 0 < plan_figures(build_plan(config))["zeta"] < 1


@pytest.mark.parametrize(
    ("gradient", "reset", "local_steps", "ratio"),
    # Xie et al., NeurIPS 2020: the settings (R_C2, R_C1, H) of their R_C
    [(64, 4, 16, 32), (512, 16, 32, 256), (2048, 8, 256, 1024)],
)
def test_the_published_ratios_of_cser(gradient, reset, local_steps, ratio):
    config = Config(
        method="cser",
        parameters=1 << 20,
        gradient_compressor=f"grbs:{gradient}",
        reset_compressor=f"grbs:{reset}",
        local_steps=local_steps,
        steps=4 * local_steps,
    )
    figures = plan_figures(build_plan(config))
    assert figures["compression_ratio_formula"] == ratio
    # One flat tensor that all ratios divide: nothing is too small to compress.
    assert figures["compression_ratio_counted"] == ratio
    assert figures["compressors"] == {
        "gradient": {
            "name": f"grbs:{gradient}",
            "delta": 1 / gradient,
            "bits": (32 << 20) // gradient,
        },
        "reset": {"name": f"grbs:{reset}", "delta": 1 / reset, "bits": (32 << 20) // reset},
    }


@pytest.mark.parametrize(
    ("changes", "ratio"),
    [
        ({"method": "data_parallel"}, 1),
        ({"method": "data_parallel", "gradient_compressor": "sign"}, 32),
        ({"method": "local_sgd", "period": "constant", "local_steps": 8}, 8),
        ({"method": "ef_sgd"}, 32),
        ({"method": "csea", "reset_compressor": "grbs:16"}, 16),
        ({"method": "cser_pl", "reset_compressor": "grbs:4", "local_steps": 4}, 16),
        ({"method": "qsparse_local_sgd", "local_steps": 8}, 64),
        (
            {"method": "sparse_loco", "local_steps": 16, "sync_compressor": "top_k:8+int8"},
            8 * 4 * 16,
        ),
        ({"method": "cser", "gradient_compressor": "zero", "reset_compressor": "identity"}, 4),
        ({"method": "cser", "local_steps": 16}, 32),
        (
            {"method": "cser", "local_steps": 16, "cser_implementation": "released"},
            pytest.approx(16 / (15 / 64 + 1 / 4)),
        ),
        ({"method": "cser", "gradient_compressor": "zero", "reset_compressor": "zero"}, None),
        ({"method": "mll_sgd", "hubs": 2, "sync_compressor": "grbs:4"}, None),
        ({"method": "qsparse_local_sgd", "sync_compressor": "powersgd:2"}, None),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_ratio_by_formula(changes, ratio):
    config = Config(steps=64, **changes)
    if changes.get("reset_compressor") == "zero":
        config = dataclasses.replace(config, parameters=64)
    figures = finite(plan_figures(build_plan(config)))
    assert figures["compression_ratio_formula"] == ratio


def test_the_ratio_under_a_period_that_changes_takes_the_mean_h():
    changes = {"method": "cser_pl", "parameters": 1 << 16, "period": "quadratic", "steps": 640}
    figures = plan_figures(build_plan(Config(reset_compressor="grbs:8", **changes)))
    assert len(figures["local_steps"]) > 1
    mean = figures["steps"] / figures["rounds"]
    assert figures["compression_ratio_formula"] == pytest.approx(8 * mean)
    assert figures["compression_ratio_counted"] == pytest.approx(8 * mean)


def test_small_tensors_count_in_the_bits_and_not_in_the_formula():
    """Logistic regression on 8 × 8 digits: 10 of 640 weights are sent, and one of 10 biases."""
    figures = plan_figures(
        build_plan(Config(method="ef_sgd", model="logistic", gradient_compressor="grbs:64"))
    )
    assert figures["compression_ratio_formula"] == 64
    assert figures["compressors"]["gradient"]["bits"] == 32 * (10 + 1)
    assert figures["compression_ratio_counted"] == 650 / 11


def test_anchors_and_residuals_count_in_the_memory():
    model = 4 * 1000
    for method, memory in [("local_sgd", (0, 0)), ("cser", (1, 0)), ("ef_sgd", (1, 4))]:
        config = Config(method=method, parameters=1000, workers=4, steps=64)
        held = plan_figures(build_plan(config))["memory_bytes"]
        if held["parameters"] == 4 * model:  # on one device
            assert (held["anchor"] / model, held["memory"] / model) == memory
        else:
            assert held["anchor"] == memory[0] * model


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 440},
        {"steps": 441, "period": "constant", "eval_every": 7},
        {"steps": 100, "local_steps": 3, "period": "constant", "eval_every": 0},
        {"method": "mll_sgd", "hubs": 2, "local_steps": 5, "steps": 400, "eval_every": 13},
        {"method": "mll_sgd", "hubs": 2, "local_steps": 5, "steps": 400, "eval_every": 3},
        {"method": "streaming_diloco", "fragments": 1, "local_steps": 24, "delay_steps": 3},
        {"method": "streaming_diloco", "fragments": 1, "local_steps": 24, "eval_every": 5},
    ],
)
def test_the_programs_are_those_of_the_dispatches(changes):
    built = build_plan(Config(parameters=640, **changes))
    round_fn, ending = make_round_fn(built), built.method.outer.steps
    pieces = dispatches(round_fn, built.steps, measure_every(built))
    sizes = {d.steps for d in pieces if not (ending and d.ends_round)}
    assert plan_figures(built)["training_programs"] == len(sizes) + 1


@pytest.mark.slow
def test_a_million_rounds_are_planned_in_seconds():
    built = build_plan(Config(parameters=640, rounds=1_000_000, local_steps=1, period="constant"))
    began = time.process_time()
    assert plan_figures(built)["rounds"] == 1_000_000
    assert time.process_time() - began < 5  # 8 s where every dispatch is enumerated
