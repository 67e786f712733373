"""The cache of compiled programs: its folder, its limit and its warnings. In the slow tier, runs
read it and repair it."""

import os
from types import SimpleNamespace

import jax
import pytest
from binaries import call, call_new
from short_runs import without_time

from experiments.launching import program_cache
from experiments.launching.program_cache import CacheWarnings
from experiments.running.recording import read_metrics

TINY = ("--dataset=least_squares", "--model=linear", "--workers=2", "--steps=4", "--momentum=0")


@pytest.fixture
def without_folder():
    """No compilation cache, as in an interpreter that no user has given one."""
    chosen = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", chosen)


def test_a_folder_that_cannot_be_written_is_one_line_of_warning(
    tmp_path, monkeypatch, without_folder
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    done = call("plan", "--parameters=64")
    assert done.status == 0, done.error
    warning = done.error
    assert warning.startswith("warning: compiled programs are not kept: ")
    assert str(tmp_path / "file") in warning and warning.count("\n") == 1


def test_the_folder_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for chosen, folder in [("", ".cache"), ("relative", ".cache"), (f"{tmp_path}/own", "own")]:
        monkeypatch.setenv("XDG_CACHE_HOME", chosen)
        assert program_cache.cache_folder() == tmp_path / folder / "jaxlocal"


def test_a_folder_that_the_user_has_chosen_stays():
    chosen = jax.config.jax_compilation_cache_dir
    program_cache.keep_programs()
    assert chosen and jax.config.jax_compilation_cache_dir == chosen


@pytest.mark.parametrize(("limit", "left"), [(35, "bcd"), (20, "cd"), (9, ""), (100, "abcd")])
def test_the_programs_that_were_used_longest_ago_are_deleted_first(limit, left, tmp_path):
    for age, name in enumerate("dcba"):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(10))
        used, written = (-age, -age - 9) if name != "b" else (-age - 9, -age)
        os.utime(path, (1e9 + used, 1e9 + written))
    (tmp_path / "other").write_bytes(bytes(1000))
    program_cache.forget_the_oldest(tmp_path, limit)
    assert sorted(tmp_path.iterdir()) == [tmp_path / f"{n}-cache" for n in left] + [
        tmp_path / "other"
    ]


def test_a_failure_is_reported_once_and_its_programs_are_deleted(tmp_path, monkeypatch):
    config = SimpleNamespace(values={"jax_compilation_cache_dir": str(tmp_path)})
    monkeypatch.setattr(program_cache, "jax", SimpleNamespace(config=config))
    for name in ("jit_f-1-cache", "jit_f-2-cache", "jit_g-1-cache", "jit_h-1-cache"):
        (tmp_path / name).write_text("")
    shown = CacheWarnings()
    message = "Error {} persistent compilation cache entry for '{}': OSError: [Errno 28] full"
    sentence = shown(message.format("writing", "jit_f"))
    assert sentence is not None and sentence.endswith("the run continues: OSError: [Errno 28] full")
    assert shown(message.format("reading", "jit_g")) is None
    assert shown("something else") == "something else"
    assert [path.name for path in tmp_path.iterdir()] == ["jit_h-1-cache"]


def entries(folder):
    return {path: path.read_bytes() for path in sorted(folder.glob("jaxlocal/*-cache"))}


@pytest.mark.slow
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
