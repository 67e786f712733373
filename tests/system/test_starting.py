"""The devices that the binaries start with, and how long these wait for each other."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from experiments.building.config import Config
from experiments.launching import starting

ROOT = Path(__file__).parents[2]


def planned_devices(*flags, **environment):
    """The devices of a plan in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.plan", "--format=json", "--parameters=64", *flags],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)["devices"]


@pytest.fixture
def one_core():
    """This thread, and what it starts, may use one core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


def test_a_cpu_is_as_many_devices_as_use_the_cores():
    assert planned_devices("--workers=8") == max(n for n in (1, 2, 4, 8) if n <= starting.cores())


def test_of_the_cores_those_count_that_are_allowed(one_core):
    assert planned_devices("--workers=8") == 1


def test_a_cpu_is_as_many_devices_as_a_mesh_asks_for():
    assert planned_devices("--workers=2", "--mesh=1x2x4") == 8
    configs = [Config(mesh=mesh) for mesh in (None, "2x4", "1x2x3", "2xx", "1x1x999999")]
    asked = [starting._asked_for(configs[:number]) for number in (0, 1, 2, 4, 5)]
    assert asked == [0, 0, 8, 8, starting.MOST_DEVICES]


def test_what_the_user_has_chosen_stays():
    chosen = "--xla_force_host_platform_device_count=4"
    assert planned_devices("--workers=8", XLA_FLAGS=chosen) == 4
    assert planned_devices("--workers=6", JAX_NUM_CPU_DEVICES="3") == 3


def test_nothing_changes_once_jax_has_started():
    devices = jax.devices()
    starting.use_the_cores([(1, 2)], 2)
    assert jax.devices() == devices


def test_the_largest_of_several_grids_decides(monkeypatch):
    set_to = {}
    fresh = SimpleNamespace(values={"jax_num_cpu_devices": -1}, update=set_to.__setitem__)
    monkeypatch.setattr(starting, "jax", SimpleNamespace(config=fresh))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    for workers in ((3,), (3, 8, 6), ()):
        grids = starting._grids([Config(workers=0), *(Config(workers=n) for n in workers)])
        starting.use_the_cores(grids, 4)
        assert set_to["jax_num_cpu_devices"] == {1: 3, 3: 4, 0: 1}[len(workers)]


def test_collectives_wait_as_long_as_the_user_says_or_long(monkeypatch):
    warn, end = starting.PATIENCE
    monkeypatch.setenv("XLA_FLAGS", f"--{end}=50 --xla_cpu_max_isa=AVX2")
    starting.be_patient()
    starting.be_patient()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags == [f"--{end}=50", "--xla_cpu_max_isa=AVX2", f"--{warn}=600"]


def test_a_file_of_flags_stays_one(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "flags.txt")
    starting.be_patient()
    assert os.environ["XLA_FLAGS"] == "flags.txt"
