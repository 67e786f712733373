"""Runs whose averages wait for slow workers: they train as without rates, over more time slots."""

import dataclasses
import shutil

import numpy as np
import pytest
from short_runs import SMALL, run, without_time

from experiments.building.job import build_plan
from experiments.building.time_slots import make_time_slots
from experiments.running.recording import CHECKPOINTS
from jaxlocal.communication.time_slots import TimeSlots

RATES = "0.5,0.75,1,1"
FAST = dataclasses.replace(SMALL, period="constant")
SLOW = dataclasses.replace(FAST, rates=RATES, wait=True, checkpoint_every=12)


def slots_of(**changes):
    given = {"rates": RATES, "parameters": 64} | changes
    planned = build_plan(dataclasses.replace(SMALL, **given))
    count = make_time_slots(planned)
    return [count(step) for step in range(SMALL.steps + 1)], planned


def test_a_run_that_waits_trains_as_one_of_fast_workers_and_resumes_its_count(tmp_path):
    status, fast = run(FAST, tmp_path / "fast")
    assert status == 0 and all(line["time_slots"] == line["step"] for line in fast)
    status, slow = run(SLOW, tmp_path / "slow")
    assert status == 0
    drop = lambda lines: [line | {"time_slots": None} for line in without_time(lines)]
    assert drop(slow) == drop(fast)
    counts = TimeSlots([[0.5, 0.75, 1, 1]], [2] * 12, seed=SLOW.seed)
    assert [line["time_slots"] for line in slow] == [counts(line["step"]) for line in slow]
    shutil.rmtree(tmp_path / "slow" / CHECKPOINTS / "24")
    status, resumed = run(SLOW, tmp_path / "slow")
    assert status == 0 and without_time(resumed) == without_time(slow)


def test_without_waiting_workers_skip_steps_and_a_slot_is_a_step():
    slots, planned = slots_of()
    assert slots == list(range(25))
    assert planned.layout.rate.tolist() == [[0.5, 0.75, 1, 1]]


@pytest.mark.parametrize(
    ("changes", "every"),
    [
        ({"period": "constant"}, 2),
        ({"method": "data_parallel"}, 1),
        ({"method": "ef_sgd"}, 1),
        ({"method": "cser"}, 1),  # which sends at every step
        ({"method": "cser", "cser_implementation": "released"}, 1),
        ({"method": "cser", "gradient_compressor": "zero"}, 2),
        ({"method": "cser_pl"}, 2),
    ],
)
def test_workers_wait_where_they_receive_messages(changes, every):
    slots, planned = slots_of(wait=True, **changes)
    assert (planned.layout.rate == 1).all()
    counts = TimeSlots([[0.5, 0.75, 1, 1]], [every] * (24 // every), seed=SMALL.seed)
    assert slots == [counts(step) for step in range(25)]


def test_hubs_wait_for_their_workers_and_for_their_neighbours():
    path = {"method": "mll_sgd", "hubs": 4, "workers": 8, "hub_graph": "path", "hub_period": 3}
    slots, _ = slots_of(wait=True, **path | {"rates": "0.5,1"})
    rates, links = np.tile([0.5, 1.0], (4, 1)), np.eye(4) + np.eye(4, k=1) + np.eye(4, k=-1)
    counts = TimeSlots(rates, [6] * 4, 2, True, links, seed=SMALL.seed)
    assert slots == [counts(step) for step in range(25)]
    complete, _ = slots_of(wait=True, **path | {"rates": "0.5,1", "hub_graph": "complete"})
    assert complete[-1] > slots[-1]
