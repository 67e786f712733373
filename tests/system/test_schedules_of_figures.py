"""The learning rates and rounds of QSR's figures at full scale, by a plan without the model."""

import dataclasses

import pytest

from experiments.building.config import Config
from experiments.building.epochs import in_steps
from experiments.building.job import build_plan
from experiments.reproducing.figure import read_figure

EPOCH = 1_281_167 // 4096  # steps, of ImageNet
STEPS = {"qsr_rules_sgd": 200 * EPOCH, "qsr_rules_adamw": 300 * EPOCH}
# Of the presets of QSR, with which experiments/README.md has the same rounds.
ROUNDS = {"qsr_rules_sgd": 12_539, "qsr_rules_adamw": 9_711}


def plans(name):
    planned = {}
    for curve in read_figure(name, "full", Config()).curves:
        steps = in_steps(curve.config, EPOCH)
        planned[curve.name] = build_plan(dataclasses.replace(steps, parameters=10))
    return planned


@pytest.mark.parametrize("name", STEPS)
def test_rounds_of_the_rules(name):
    planned = plans(name)
    steps = STEPS[name]
    assert {plan.steps for plan in planned.values()} == {steps}
    rounds = {curve: len(plan.lengths) for curve, plan in planned.items()}
    assert rounds["data parallel"] == steps and rounds["SWAP"] == steps / 2 + 1
    assert rounds["H = 4"] == steps / 4 and rounds["H = 8"] == steps / 8
    assert rounds["QSR, H from 4"] == ROUNDS[name]
    # All rules leave H = 4 at the same learning rate, up to the three digits of the coefficients.
    leave = {
        curve: next(4 * n for n, length in enumerate(plan.lengths) if length != 4)
        for curve, plan in planned.items()
        if "rule" in curve or "QSR" in curve
    }
    assert len(leave) == 3 and max(leave.values()) - min(leave.values()) < 0.01 * steps


def test_schedules_end_as_they_are_named():
    planned = plans("qsr_schedules")
    rates = {name: plan.learning_rate for name, plan in planned.items() if "QSR" in name}
    linear, step, powers = (
        [rate(at * EPOCH) for at in (5, 29, 30, 61, 89)] for rate in rates.values()
    )
    assert linear[3] == pytest.approx(0.8 * (200 - 61) / 195, rel=1e-3)
    assert step == pytest.approx([0.8, 0.8, 0.08, 0.008, 0.008])
    assert powers[0] == 1 and powers[-1] == 0.5
    lengths = planned["step decay: QSR, H from 4"].lengths
    # (0.2 / 0.08)² = 6.25, and (0.2 / 0.008)² is 625 up to rounding.
    assert set(lengths[:-1]) <= {4, 6, 624, 625} and sum(lengths) == 90 * EPOCH
