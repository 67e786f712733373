"""Damage at random places of every file of a checkpoint: what is restored is what was saved, or the
checkpoint before it with a warning, and never another state."""

import collections
import random
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_states import as_numbers, shapes_of

from jaxlocal import ConfigurationError
from jaxlocal.training.checkpoints import Checkpoints
from jaxlocal.types import Memory, RoundMemory, TrainState

pytestmark = pytest.mark.slow

FLIPS = 84  # of single bits at least, divided over the files
STEPS = (4, 8)


def state_at(step):
    """A state of all kinds of leaves, some in files of their own and some within the database."""
    noise = np.random.default_rng(step)
    stacked = lambda *shape: noise.normal(size=(1, 4, *shape)).astype(np.float32)
    params = {"matrix": stacked(20, 30), "half": stacked(40).astype(jnp.bfloat16)}
    numbers = {"count": np.full((1, 4), step, np.int32), "empty": np.zeros((1, 4, 0), np.float32)}
    memory = RoundMemory(Memory(), Memory(stacked=stacked(500), single=stacked(20)[0, 0]))
    keys = jax.random.split(jax.random.key(step), (1, 4))
    leaves = (params, {"keys": keys}, numbers, stacked(20, 30)[0, 0], memory)
    return jax.tree.map(jnp.asarray, TrainState(*leaves, jax.random.key(0), np.int32(step)))


def bits(tree):
    """The bytes of all leaves."""
    return [leaf.tobytes() for leaf in jax.tree.leaves(as_numbers(tree))]


def notes_at(step):
    return {"measurements": step, "seconds": step / 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        for step in STEPS:
            checkpoints.save(state_at(step), notes_at(step))
    return folder


def flip(file, choose):
    data = bytearray(file.read_bytes())
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    file.write_bytes(data)


def overwrite(file, choose):
    data = bytearray(file.read_bytes())
    start = choose.randrange(len(data))
    length = min(64, len(data) - start)
    data[start : start + length] = choose.randbytes(length)
    file.write_bytes(data)


def truncate(file, choose):
    file.write_bytes(file.read_bytes()[: choose.randrange(file.stat().st_size)])


def delete(file, choose):
    file.unlink()


def outcome(folder):
    """Restore from a folder whose newest checkpoint is damaged, and check what is restored; returns
    its step."""
    with warnings.catch_warnings(record=True) as caught, Checkpoints(folder) as checkpoints:
        warnings.simplefilter("always")
        state, notes = checkpoints.restore(shapes_of(state_at(STEPS[-1])))
    step, dtypes = int(state.step), lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert bits(state) == bits(state_at(step)), "another state, without a word"
    assert notes == notes_at(step)
    assert dtypes(state) == dtypes(state_at(step))
    assert (folder / "8.damaged").exists() == (step == 4) == bool(caught)
    if caught:
        (warning,) = caught
        assert "8 is damaged" in str(warning.message) and "\n" not in str(warning.message)
    return step


def kind(file, data):
    """The kind of a file: its path, without the names that Orbax draws at random."""
    parts = ("*" if len(part) == 32 else part for part in file.parts)
    return "array data" if file == data else "/".join(parts)


def test_no_damage_of_a_file_gives_another_state(saved, tmp_path, times):
    choose, found = random.Random(times), collections.defaultdict(collections.Counter)
    paths = sorted(path for path in (saved / "8").rglob("*") if path.is_file())
    files = [path.relative_to(saved / "8") for path in paths]
    data = max(paths, key=lambda path: path.stat().st_size).relative_to(saved / "8")
    for damage in (flip, overwrite, truncate, delete):
        repeats = -(-FLIPS // len(files)) if damage is flip else 1
        for file in files * (repeats * times):
            shutil.copytree(saved, tmp_path / "copy")
            damage(tmp_path / "copy" / "8" / file, choose)
            restored = "the same" if outcome(tmp_path / "copy") == 8 else "the one before"
            found[damage.__name__, kind(file, data)][restored] += 1
            shutil.rmtree(tmp_path / "copy")
    for (name, file), counts in sorted(found.items()):
        print(f"{name:10} {file:45} {dict(counts)}")
    for part in ("array data", "manifest/metadata", "notes/metadata"):
        counts = found["flip", part]  # a bit may be unused, and `outcome` has compared all others
        assert counts["the one before"] > counts["the same"], f"flips of {part} are not found"


def test_damage_of_all_checkpoints_is_an_error(saved, tmp_path, times):
    choose = random.Random(times)
    shutil.copytree(saved, tmp_path / "copy")
    for step in map(str, STEPS):
        flip(tmp_path / "copy" / step / "notes" / "metadata", choose)
    with Checkpoints(tmp_path / "copy") as checkpoints, pytest.raises(ConfigurationError):
        checkpoints.restore(shapes_of(state_at(STEPS[-1])))
