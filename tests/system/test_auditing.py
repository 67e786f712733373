"""`plan --audit` shows the bytes of the accounting and those of the compiled program."""

import io
import re

import pytest
from rich.console import Console

from experiments.building.config import Config
from experiments.building.job import build_plan
from experiments.planning.auditing import audited, show_audit
from jaxlocal import ConfigurationError

VALUES = 64 * 10 + 10  # of a logistic regression on digits


def printed(figures):
    console = Console(file=io.StringIO(), width=120)
    show_audit(console, figures)
    return console.file.getvalue()


def test_a_round_on_hubs_is_shown_by_axis():
    job = build_plan(
        Config(method="mll_sgd", model="logistic", hubs=4, hub_graph="ring", hub_period=2, steps=8)
    )
    figures = audited(job)
    assert (figures["steps"], figures["mesh"]) == (8, {"hubs": 4, "workers": 2})
    rows = {(row["collective"], *row["axes"]): row for row in figures["round"]}
    in_hub, between = rows["all-reduce", "workers"], rows["collective-permute", "hubs"]
    # A worker takes part in two averages, and a hub has two neighbours.
    assert in_hub["bytes_accounting"] == in_hub["bytes_program"] == 2 * 4 * VALUES
    assert between["bytes_accounting"] == between["bytes_program"] == 2 * 4 * VALUES
    assert re.search(r"all-reduce +workers +float32 +5,200 +5,200 +2\n", printed(figures))


def test_one_device_sends_nothing():
    figures = audited(build_plan(Config(model="logistic", workers=1, steps=4)))
    assert figures["round"] == [] and "all workers are on one device" in printed(figures)


def test_a_plan_without_a_model_has_no_program():
    with pytest.raises(
        ConfigurationError, match="--parameters=100 plans a model without building it"
    ):
        audited(build_plan(Config(parameters=100, steps=4)))
