"""The binaries in new interpreters: they do what they do in that of the tests, start JAX with the
devices that were asked for, and keep compiled programs for later runs."""

import json
import os

import pytest
from binaries import call, call_new
from short_runs import check_other_devices, without_time

from experiments.launching import starting
from experiments.running.recording import read_metrics

pytestmark = pytest.mark.slow

TINY = ("--dataset=least_squares", "--model=linear", "--workers=2", "--steps=4", "--momentum=0")
SIGN = ("--method=data_parallel", "--gradient_compressor=sign", "--parameters=64", "--mesh=1x1")


@pytest.mark.parametrize(
    ("module", "arguments", "status"),
    [
        ("train", ["--help"], 0),
        ("train", ["--method=local_sdg"], 2),
        ("train", ["--no_such_flag=1"], 2),
        ("train", ["--flagfile=no_such_file"], 2),
        ("train", ["stray"], 2),
        ("train", ["--method=mll_sgd", "--local_steps=16", "--steps=100"], 2),
        ("train", ["--dataset=mnist", "--data_dir=nowhere"], 2),
        ("plan", SIGN, 0),
        ("plan", ["--format=json", "--mesh=1x1"], 0),
        ("plan", ["--format=jason"], 2),
        ("compare", ["--help"], 0),
        ("compare", ["no_such_folder"], 2),
        ("prepare", ["--datset=mnist"], 2),
    ],
)
def test_a_new_interpreter_prints_and_ends_as_that_of_the_tests(module, arguments, status):
    done = call_new(module, *arguments)
    assert done.status == status, done.error
    assert call(module, *arguments) == done


def test_flags_txt_runs_again_on_more_devices_with_the_same_numbers(tmp_path):
    check_other_devices(
        tmp_path, lambda count, *flags: call_new("train", *flags, JAX_NUM_CPU_DEVICES=str(count))
    )


@pytest.fixture
def one_core():
    """This thread, and the processes that it starts, may use one core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


def planned_devices(*flags, **environment):
    settings = {"XLA_FLAGS": "", **environment}
    done = call_new("plan", "--format=json", "--parameters=64", *flags, **settings)
    assert done.status == 0 and not done.error, done.error
    return json.loads(done.out)["devices"]


def test_a_cpu_is_as_many_devices_as_use_the_cores():
    assert planned_devices("--workers=8") == max(n for n in (1, 2, 4, 8) if n <= starting.cores())


def test_only_the_cores_that_are_allowed_count(one_core):
    assert planned_devices("--workers=8") == 1


def test_a_cpu_is_as_many_devices_as_a_mesh_asks_for():
    assert planned_devices("--workers=2", "--mesh=1x2x4") == 8


def test_devices_that_the_user_has_chosen_stay():
    chosen = "--xla_force_host_platform_device_count=4"
    assert planned_devices("--workers=8", XLA_FLAGS=chosen) == 4
    assert planned_devices("--workers=6", JAX_NUM_CPU_DEVICES="3") == 3


def entries(folder):
    return {path: path.read_bytes() for path in sorted(folder.glob("jaxlocal/*-cache"))}


def test_programs_are_kept_and_damaged_ones_are_compiled_again(tmp_path, monkeypatch):
    for name in list(os.environ):
        if "CACHE" in name:
            monkeypatch.delenv(name)
    home, runs = tmp_path / "caches", [tmp_path / name for name in ("none", "first", "again")]

    def warnings(folder, **environment):
        done = call_new("train", *TINY, f"--workdir={folder}", **environment)
        assert done.status == 0, done.error
        return done.error

    assert warnings(runs[0], JAX_COMPILATION_CACHE_DIR="") == ""
    assert warnings(runs[1], XDG_CACHE_HOME=str(home)) == ""
    kept = entries(home)
    assert len(kept) > 4 and (home / "jaxlocal").stat().st_mode & 0o077 == 0
    damaged = list(kept)[::2]
    for path in damaged:
        path.write_bytes(kept[path][: len(kept[path]) // 2])
    warning = warnings(runs[2], XDG_CACHE_HOME=str(home))
    assert warning.startswith("warning: reading compiled programs in") and warning.count("\n") == 1
    healed = entries(home)
    assert healed.keys() <= kept.keys() and healed.keys() & set(damaged)
    assert all(len(program) > 0.9 * len(kept[path]) for path, program in healed.items())
    first, *others = [without_time(read_metrics(folder)) for folder in runs]
    assert others == [first, first]
