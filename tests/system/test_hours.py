"""The hours of a plan: its flags, closed forms on clusters, and the published hours of QSR."""

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import reference_periods
from absl import flags
from rich.console import Console

from experiments import plan as binary
from experiments.building.config import Config
from experiments.building.job import build_plan
from experiments.launching import command_line
from experiments.planning import cluster, hours, step_time
from experiments.planning.options import Options, define_flags, from_flags
from experiments.running.recording import finite
from jaxlocal import ConfigurationError
from jaxlocal.communication.accounting import message_bits, model_bits

PRESET = Path(__file__).parents[2] / "experiments" / "presets" / "qsr_vit_b.flags"
MODEL = 1 << 20
CLUSTER = {"bandwidth_gbps": 8.0, "latency_us": 1000.0, "step_ms": 500.0}  # a gigabyte a second
PUBLISHED = {16: (26.7, 20.2), 64: (8.6, 5.5)}  # GPUs: hours of data parallel and of QSR


def options(*words):
    values = flags.FlagValues()
    define_flags(values)
    values(["plan", *words])
    return from_flags(values)


def job(**changes):
    return build_plan(Config(**{"parameters": MODEL, "steps": 48, "local_steps": 4, **changes}))


def on_cluster(planned, **changes):
    return cluster.on_cluster(planned, Options(**{**CLUSTER, **changes}))


def seconds(figures):
    return [3600 * figures[f"{part}_hours"] for part in ("compute", "communication", "waiting")]


def test_a_local_run_and_data_parallelism_on_their_cluster():
    figures = on_cluster(job(period="constant", workers=4))
    average = 6 * 1e-3 + 1.5 * 4 * MODEL / 1e9
    assert seconds(figures["planned"]) == pytest.approx([24, 12 * average, 0])
    assert seconds(figures["data_parallel"]) == pytest.approx([24, 48 * average, 0])
    total = figures["planned"]["total_hours"]
    assert total == pytest.approx((24 + 12 * average) / 3600)
    assert (figures["devices"], figures["all_reduce"]) == (4, "ring")


def test_planned_data_parallelism_costs_as_much_as_the_baseline():
    figures = on_cluster(job(method="data_parallel", workers=4), jitter=0.1, slowdown="1.5")
    assert figures["planned"] == pytest.approx(figures["data_parallel"], rel=1e-12)
    assert figures["planned"]["waiting_hours"] > 0


def test_hubs_average_their_workers_and_send_to_neighbours():
    ring = job(method="mll_sgd", workers=8, hubs=4, hub_graph="ring", hub_period=3)
    figures = on_cluster(ring)
    size = 4 * MODEL / 1e9
    in_hub, round_end = 2 * 1e-3 + size, 2 * (1e-3 + size)
    assert seconds(figures["planned"]) == pytest.approx([24, 12 * in_hub + 4 * round_end, 0])
    # A hub on each device: only hubs send.
    figures = on_cluster(ring, cluster_devices=4)
    assert seconds(figures["planned"]) == pytest.approx([48, 4 * round_end, 0])


def test_an_end_of_a_round_that_takes_steps_overlaps_them():
    planned = job(period="constant", workers=4)
    outer = planned.method.outer._replace(steps=2)
    overlapped = dataclasses.replace(planned, method=planned.method._replace(outer=outer))
    figures = on_cluster(overlapped, step_ms=4.0)
    average = 6 * 1e-3 + 1.5 * 4 * MODEL / 1e9
    assert seconds(figures["planned"]) == pytest.approx([0.192, 12 * (average - 0.008), 0])


def test_the_released_cser_sends_one_message_a_step_of_which_none_overlaps():
    compressors = {"gradient_compressor": "grbs:4", "reset_compressor": "identity"}
    planned = job(method="cser", cser_implementation="released", workers=4, **compressors)
    whole, quarter = (6 * 1e-3 + 1.5 * 4 * MODEL / ratio / 1e9 for ratio in (1, 4))
    figures = on_cluster(planned, jitter=0.1)
    assert seconds(figures["planned"])[1] == pytest.approx(36 * quarter + 12 * whole)
    assert figures["planned"]["waiting_hours"] == pytest.approx(
        figures["data_parallel"]["waiting_hours"]
    )


def test_all_fragments_together_cost_as_much_as_the_model():
    # The tensors of an MLP have unequal sizes, and so have the messages of the rounds.
    same = {"parameters": None, "model": "mlp", "workers": 4, "local_steps": 8}
    streamed = job(method="streaming_diloco", fragments=4, delay_steps=0, **same)
    streamed, whole = (
        on_cluster(planned, latency_us=0.0) for planned in (streamed, job(method="diloco", **same))
    )
    assert seconds(streamed["planned"]) == pytest.approx(seconds(whole["planned"]))


def test_compressed_messages_are_averaged_or_gathered():
    quarter = MODEL / 1e9  # a fourth of 4 bytes a value
    averaged = on_cluster(job(method="csea", workers=4, reset_compressor="grbs:4"))
    ring = 6 * 1e-3 + 1.5 * quarter
    assert seconds(averaged["planned"])[1] == pytest.approx(48 * ring)
    gathered = job(method="qsparse_local_sgd", workers=4, sync_compressor="int8")
    messages = gathered.method.outer.communication(gathered.state)
    sent = message_bits(messages, gathered.layout).workers / 8
    figures = on_cluster(gathered)
    # Each device receives three messages of two types: a byte for every value, and float32 for the
    # scales and the worker's weight.
    assert MODEL < sent < 1.1 * MODEL
    assert seconds(figures["planned"])[1] == pytest.approx(12 * (6e-3 + 3 * (sent + 4) / 1e9))


def test_workers_that_skip_steps_make_others_wait_only_in_data_parallelism():
    planned = job(method="mll_sgd", workers=4, hubs=2, rates="0.25,1", period="constant")
    figures = on_cluster(planned)
    assert seconds(figures["planned"])[::2] == pytest.approx([24, 0])
    # The mean worker computes 2.5 slots a step, the slowest 4.
    assert seconds(figures["data_parallel"])[::2] == pytest.approx([24 * 2.5, 24 * 1.5])
    assert model_bits(planned.state.params) == 32 * MODEL


def test_a_run_that_waits_takes_as_long_as_its_slowest_worker():
    planned = job(period="constant", workers=4, rates="0.25,1,1,1", wait=True)
    figures = on_cluster(planned)
    assert seconds(figures["planned"])[::2] == pytest.approx([24 * 1.75, 24 * 2.25])


def test_a_step_that_is_not_given_is_measured_without_compilation(monkeypatch):
    calls = []

    def interleaved_seconds(programs, turns):
        for name, program in [*programs.items()] * 2:
            program()
            calls.append(name)
        return {"4": [1.4, 1.5, 1.4], "16": [2.6, 2.7, 2.9]}

    monkeypatch.setattr(step_time, "interleaved_seconds", interleaved_seconds)
    least_squares = Config(
        dataset="least_squares", model="linear", workers=4, method="mll_sgd", hubs=2, steps=48
    )
    planned = build_plan(least_squares)
    assert step_time.measure_steps(planned) == pytest.approx([100, 100, 125])
    assert calls == ["4", "16"] * 2
    figures = cluster.on_cluster(planned, Options(bandwidth_gbps=1))
    assert figures["step_ms"]["median"] == pytest.approx(100)
    assert seconds(figures["planned"])[0] == pytest.approx(4.8)
    shown = io.StringIO()
    hours.show_hours(Console(file=shown, width=200), {"cluster": figures})
    assert "100 ms (100 … 125, measured on this machine's cpu" in shown.getvalue()


@pytest.mark.parametrize("gpus", PUBLISHED)
def test_the_published_hours_of_qsr_and_what_they_predict(gpus):
    values = flags.FlagValues()
    command_line.define_flags(values)
    values(["plan", f"--flagfile={PRESET}"])
    config = dataclasses.replace(command_line.from_flags(values), workers=gpus)
    data_parallel, planned = PUBLISHED[gpus]
    words = [f"--hours_data_parallel={data_parallel}", f"--hours_planned={planned}"]
    figures = hours.plan_hours(build_plan(config), options(*words))["fit"]
    # 9,711 of 93,600 steps end a round: see the plan's tests.
    slope = (data_parallel - planned) / (1 - 9711 / 93600)
    compute = data_parallel - slope
    assert figures["communication_hours"] == pytest.approx(slope, rel=1e-9)
    assert figures["compute_hours"] == pytest.approx(compute, rel=1e-9)
    assert compute + 9711 / 93600 * slope == pytest.approx(planned)
    assert figures["all_reduce_ms"] == pytest.approx(slope * 3.6e6 / 93600)
    link = 2 * (gpus - 1) / gpus * 32 * 86_381_800 / (slope * 3600 / 93600)
    assert figures["ring_gbps"] == pytest.approx(link / 1e9)
    got = {p["period"].split(",")[0]: p for p in figures["predictions"][5:]}
    assert [p["rounds"] for p in figures["predictions"][:5]] == [46800, 23400, 11700, 5850, 2925]
    assert got["post-local"]["rounds"] == 46800 + 46800 // 4
    rate = reference_periods.schedule("cosine", 0.008, 93_600, 10_000)
    for name, power in (("linear", 1), ("cubic", 3)):
        # H grows to 5 where it does by the quadratic rule with α = 2.2 · 0.008.
        rule = 2.2 * 0.008 * 5 ** (1 / power - 1 / 2), 4, power, 10_000
        assert got[name]["rounds"] == len(reference_periods.qsr(rate, 93_600, *rule))
    for p in figures["predictions"]:
        assert p["hours"] == pytest.approx(compute + p["rounds"] / 93600 * slope)
    shown = io.StringIO()
    hours.show_hours(Console(file=shown, width=200), {"fit": figures})
    assert "predictions of this fit" in shown.getvalue() and "not measured" in shown.getvalue()


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("cser", {}),
        ("data_parallel", {}),
        ("mll_sgd", {"hubs": 2}),
        ("local_sgd", {"workers": 1}),
    ],
)
def test_the_fit_is_for_a_model_a_round(method, changes):
    known = options("--hours_data_parallel=3", "--hours_planned=2")
    with pytest.raises(ConfigurationError, match=f"one model per round.*{method}"):
        hours.plan_hours(job(method=method, **changes), known)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bandwidth_gbps=0"], "--bandwidth_gbps must be a number > 0, got 0.0"),
        (["--bandwidth_gbps=inf"], "--bandwidth_gbps must be a number > 0, got inf"),
        (["--bandwidth_gbps=1", "--step_ms=nan"], "--step_ms must be a number > 0, got nan"),
        (["--bandwidth_gbps=1", "--cluster_devices=0"], "--cluster_devices must be a number > 0"),
        (["--latency_us=50"], "--latency_us=50.0 needs --bandwidth_gbps too"),
        (["--all_reduce=ring"], "--all_reduce=ring needs --bandwidth_gbps too"),
        (["--hours_planned=2"], "--hours_planned=2.0 needs --hours_data_parallel too"),
        (["--hours_data_parallel=2"], "--hours_data_parallel=2.0 needs --hours_planned too"),
        (["--hours_data_parallel=-2"], "--hours_data_parallel must be a number > 0, got -2.0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(words, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        options(*words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latency_us": -1.0}, "the latency in µs must be a number ≥ 0, got -1.0"),
        ({"jitter": 2.0}, "the jitter must be in [0, 1], got 2.0"),
        ({"all_reduce": "rin"}, "unknown all-reduce 'rin'; did you mean 'ring'"),
        ({"slowdown": "2,x"}, "--slowdown=2,x must be numbers"),
        ({"slowdown": "0"}, "the slowdown of device 0 must be a number > 0, got 0.0"),
        ({"cluster_devices": 3}, "1 hubs × 8 workers do not divide over --cluster_devices=3"),
        ({"step_ms": None}, f"--parameters={MODEL} plans a model without building it"),
    ],
)
def test_a_cluster_that_does_not_fit_is_refused_before_anything_is_measured(changes, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        on_cluster(job(), **changes)


def test_the_plan_prints_the_hours_as_text_and_as_json(monkeypatch, capsys):
    values = flags.FlagValues()
    command_line.define_flags(values)
    binary.define_plan_flags(values)
    words = ["--bandwidth_gbps=8", "--latency_us=1000", "--step_ms=500", "--hours_planned=2"]
    words += [f"--parameters={MODEL}", "--steps=48", "--workers=4"]
    values(["plan", "--format=json", *words, "--hours_data_parallel=3"])
    monkeypatch.setattr(binary, "FLAGS", values)
    monkeypatch.setattr(binary, "start", lambda configs: None)
    assert binary.main() == 0
    printed = json.loads(capsys.readouterr().out)
    planned = build_plan(Config(parameters=MODEL, steps=48, workers=4))
    expected = hours.plan_hours(planned, from_flags(values))
    assert {name: printed[name] for name in ("cluster", "fit")} == json.loads(
        json.dumps(finite(expected))
    )
    values["format"].value = "text"
    assert binary.main() == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "hours on a cluster of 8 devices" not in text and "cluster of 4 devices" in text
    assert "8 Gbit/s, 1000 µs" in text and "not measured" in text
