"""The number of virtual devices that the commands start with, and how long these wait for each
other. The slow tier starts JAX with them."""

import json
import os
from types import SimpleNamespace

import jax
import pytest
from binaries import call_new

from experiments.building.config import Config
from experiments.launching import starting


@pytest.fixture
def chosen(monkeypatch):
    """What `starting` sets in an interpreter in which JAX has not started, by name."""
    options = {}
    fresh = SimpleNamespace(values={"jax_num_cpu_devices": -1}, update=options.__setitem__)
    monkeypatch.setattr(starting, "jax", SimpleNamespace(config=fresh))
    monkeypatch.setattr(starting, "be_patient", lambda: None)
    monkeypatch.setattr(starting, "keep_programs", lambda: None)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return SimpleNamespace(options=options, values=fresh.values)


@pytest.fixture
def one_core():
    """This thread, and the processes that it starts, may use one core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


def devices(chosen, **flags):
    starting.start([Config(parameters=64, **flags)])
    return chosen.options.get("jax_num_cpu_devices")


def test_a_cpu_is_as_many_devices_as_use_the_cores(chosen):
    expected = max(n for n in (1, 2, 4, 8) if n <= starting.cores())
    assert devices(chosen, workers=8) == expected


def test_only_the_cores_that_are_allowed_count(chosen, one_core):
    assert devices(chosen, workers=8) == 1


def test_a_cpu_is_as_many_devices_as_a_mesh_asks_for(chosen):
    assert devices(chosen, workers=2, mesh="1x2x4") == 8
    configs = [Config(mesh=mesh) for mesh in (None, "2x4", "1x2x3", "2xx", "1x1x999999")]
    asked = [starting._asked_for(configs[:number]) for number in (0, 1, 2, 4, 5)]
    assert asked == [0, 0, 8, 8, starting.MOST_DEVICES]


def test_devices_that_the_user_has_chosen_stay(chosen, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    assert devices(chosen, workers=8) is None
    monkeypatch.delenv("XLA_FLAGS")
    chosen.values["jax_num_cpu_devices"] = 3
    assert devices(chosen, workers=6) is None


def test_nothing_changes_once_jax_has_started():
    before = jax.devices()
    starting.use_the_cores([(1, 2)], 2)
    assert jax.devices() == before


def test_the_largest_of_several_grids_decides(chosen):
    for workers in ((3,), (3, 8, 6), ()):
        grids = starting._grids([Config(workers=0), *(Config(workers=n) for n in workers)])
        starting.use_the_cores(grids, 4)
        assert chosen.options["jax_num_cpu_devices"] == {1: 3, 3: 4, 0: 1}[len(workers)]


def test_collectives_wait_as_long_as_the_user_asks_or_long(monkeypatch):
    warn, end = starting.PATIENCE
    monkeypatch.setenv("XLA_FLAGS", f"--{end}=50 --xla_cpu_max_isa=AVX2")
    starting.be_patient()
    starting.be_patient()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags == [f"--{end}=50", "--xla_cpu_max_isa=AVX2", f"--{warn}=600"]


def test_a_file_of_flags_is_left_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "flags.txt")
    starting.be_patient()
    assert os.environ["XLA_FLAGS"] == "flags.txt"


def planned_devices(*flags, **environment):
    """The devices of a plan in a new interpreter."""
    settings = {"XLA_FLAGS": "", **environment}
    done = call_new("plan", "--format=json", "--parameters=64", *flags, **settings)
    assert done.status == 0 and not done.error, done.error
    return json.loads(done.out)["devices"]


@pytest.mark.slow
def test_jax_starts_with_as_many_devices_as_use_the_cores():
    assert planned_devices("--workers=8") == max(n for n in (1, 2, 4, 8) if n <= starting.cores())


@pytest.mark.slow
def test_jax_starts_with_one_device_on_one_core(one_core):
    assert planned_devices("--workers=8") == 1


@pytest.mark.slow
def test_jax_starts_with_as_many_devices_as_a_mesh_asks_for():
    assert planned_devices("--workers=2", "--mesh=1x2x4") == 8


@pytest.mark.slow
def test_jax_starts_with_the_devices_that_the_user_has_chosen():
    chosen = "--xla_force_host_platform_device_count=4"
    assert planned_devices("--workers=8", XLA_FLAGS=chosen) == 4
    assert planned_devices("--workers=6", JAX_NUM_CPU_DEVICES="3") == 3
