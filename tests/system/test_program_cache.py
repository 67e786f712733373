"""The cache of compiled programs: its folder, its limit and its warnings.

That runs read and repair it is tested in `test_new_interpreters.py`.
"""

import os
from types import SimpleNamespace

import jax
import pytest
from binaries import call

from experiments.launching import program_cache
from experiments.launching.program_cache import CacheWarnings


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
