"""Compiled programs are kept: with the same numbers, within a limit, and no matter what happens to
them."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from short_runs import without_time

from experiments.launching import program_cache
from experiments.launching.program_cache import CacheWarnings
from experiments.running.recording import read_metrics

ROOT = Path(__file__).parents[2]
TINY = ("--dataset=least_squares", "--model=linear", "--workers=2", "--steps=4", "--momentum=0")


def call(module, *flags, **environment):
    """The errors and warnings of a binary to which no folder is given but by the environment."""
    inherited = {name: text for name, text in os.environ.items() if "CACHE" not in name}
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *flags],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def entries(folder):
    return {path: path.read_bytes() for path in sorted(folder.glob("jaxlocal/*-cache"))}


def test_programs_are_kept_and_damaged_ones_made_anew(tmp_path):
    home, runs = tmp_path / "caches", [tmp_path / name for name in ("none", "first", "again")]
    assert call("train", *TINY, f"--workdir={runs[0]}", JAX_COMPILATION_CACHE_DIR="") == ""
    assert call("train", *TINY, f"--workdir={runs[1]}", XDG_CACHE_HOME=str(home)) == ""
    kept = entries(home)
    assert len(kept) > 4 and (home / "jaxlocal").stat().st_mode & 0o077 == 0
    damaged = list(kept)[::2]
    for path in damaged:
        path.write_bytes(kept[path][: len(kept[path]) // 2])
    warning = call("train", *TINY, f"--workdir={runs[2]}", XDG_CACHE_HOME=str(home))
    assert warning.startswith("warning: reading compiled programs in") and warning.count("\n") == 1
    healed = entries(home)
    assert healed.keys() <= kept.keys() and healed.keys() & set(damaged)
    assert all(len(program) > 0.9 * len(kept[path]) for path, program in healed.items())
    first, *others = [without_time(read_metrics(folder)) for folder in runs]
    assert others == [first, first]


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    warning = call("plan", "--parameters=64", XDG_CACHE_HOME=str(tmp_path / "file"))
    assert warning.startswith("warning: compiled programs are not kept: ")
    assert str(tmp_path / "file") in warning and warning.count("\n") == 1


def test_the_folder_is_that_of_the_users_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for chosen, folder in [("", ".cache"), ("relative", ".cache"), (f"{tmp_path}/own", "own")]:
        monkeypatch.setenv("XDG_CACHE_HOME", chosen)
        assert program_cache.cache_folder() == tmp_path / folder / "jaxlocal"


def test_what_the_user_has_chosen_stays():
    chosen = jax.config.jax_compilation_cache_dir
    program_cache.keep_programs()
    assert chosen and jax.config.jax_compilation_cache_dir == chosen


@pytest.mark.parametrize(("limit", "left"), [(35, "bcd"), (20, "cd"), (9, ""), (100, "abcd")])
def test_the_programs_that_were_used_longest_ago_go_first(limit, left, tmp_path):
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


def test_trouble_is_told_once_and_deletes_what_it_is_about(tmp_path, monkeypatch):
    config = SimpleNamespace(values={"jax_compilation_cache_dir": str(tmp_path)})
    monkeypatch.setattr(program_cache, "jax", SimpleNamespace(config=config))
    for name in ("jit_f-1-cache", "jit_f-2-cache", "jit_g-1-cache", "jit_h-1-cache"):
        (tmp_path / name).write_text("")
    shown = CacheWarnings()
    said = "Error {} persistent compilation cache entry for '{}': OSError: [Errno 28] full"
    sentence = shown(said.format("writing", "jit_f"))
    assert sentence is not None and sentence.endswith("the run continues: OSError: [Errno 28] full")
    assert shown(said.format("reading", "jit_g")) is None
    assert shown("something else") == "something else"
    assert [path.name for path in tmp_path.iterdir()] == ["jit_h-1-cache"]
