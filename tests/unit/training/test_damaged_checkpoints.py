"""A damaged checkpoint is never used: it is set aside, and the one before it is restored."""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_states import as_numbers, assert_same_bits, shapes_of, state_of

from jaxlocal import ConfigurationError
from jaxlocal.training.checkpoints import Checkpoints, SavingError


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints of steps 4 and 8, the shapes of the state, and the last one."""
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder) as checkpoints:
        for step in (4, 8):
            noise = np.random.default_rng(step).normal(size=(1, 4, 3, 2))
            params = {"matrix": jnp.float32(noise), "half": jnp.bfloat16(noise)}
            state = state_of(params, jnp.int32(step))
            checkpoints.save(state, {"saved": step})
    return folder, shapes_of(state), as_numbers(state)


def truncate(path):
    for part in [path] if path.is_file() else path.iterdir():
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def edit(path):
    path.write_text(path.read_text().replace("8", "9"))


DAMAGES = {
    "a truncated tree": (truncate, "state/_METADATA", "line 1 column"),
    "truncated data": (truncate, "state/d", "Requested byte range"),
    "a truncated database": (truncate, "state/manifest.ocdbt", "Error decoding manifest"),
    "truncated notes": (truncate, "notes/metadata", "Unterminated string"),
    "edited notes": (edit, "notes/metadata", "its notes have changed since it was saved"),
    "edited digests": (edit, "manifest/metadata", "its manifest has changed since it was saved"),
    "no tree": (remove, "state/_METADATA", "it has no state/_METADATA"),
    "no state": (remove, "state", "it has no state)"),
    "no notes": (remove, "notes", "it has no notes"),
    "no digests": (remove, "manifest", "it has no digests"),
    "an empty folder": (
        lambda path: [remove(one) for one in path.iterdir()],
        ".",
        "it has no digests",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_restored(two, tmp_path, name):
    damage, file, why = DAMAGES[name]
    shutil.copytree(two[0], tmp_path / "copy")
    damage(tmp_path / "copy" / "8" / file)
    with Checkpoints(tmp_path / "copy") as checkpoints:
        with pytest.warns(UserWarning, match="from step 4") as caught:
            state, notes = checkpoints.restore(two[1])
        assert len(caught) == 1
        sentence = str(caught[0].message)
        assert "copy/8 is damaged" in sentence and why in sentence and "\n" not in sentence
        assert int(state.step) == 4 and notes == {"saved": 4}
        checkpoints.save(state._replace(step=state.step + 4))
        checkpoints.wait()
        assert checkpoints.steps == [4, 8]
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["4", "8", "8.damaged"]


def test_a_changed_value_is_found_whatever_holds_it(two, tmp_path):
    """Another checkpoint's data in the place of its own: all files are whole."""
    for part in ("state", "notes", "manifest"):
        shutil.copytree(two[0], tmp_path / part)
        remove(tmp_path / part / "8" / part)
        shutil.copytree(two[0] / "4" / part, tmp_path / part / "8" / part)
        with (
            Checkpoints(tmp_path / part) as checkpoints,
            pytest.warns(UserWarning, match="damaged"),
        ):
            assert int(checkpoints.restore(two[1])[0].step) == 4


def test_a_renamed_folder_is_not_taken_for_its_step(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "copy")
    (tmp_path / "copy" / "8").rename(tmp_path / "copy" / "12")
    warned = pytest.warns(match=r"copy/12 is damaged \(it holds step 8\)")
    with Checkpoints(tmp_path / "copy") as checkpoints, warned:
        assert int(checkpoints.restore(two[1])[0].step) == 4


def test_damage_without_an_older_checkpoint_is_an_error_that_says_how_to_start_again(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "copy")
    for step in ("4", "8"):
        edit(tmp_path / "copy" / step / "manifest" / "metadata")
    raised = pytest.raises(ConfigurationError)
    with Checkpoints(tmp_path / "copy") as checkpoints, raised as caught:
        checkpoints.restore(two[1])
    assert str(caught.value) == (
        f"no checkpoint in {tmp_path / 'copy'} can be used; the newest, 8, is damaged (its "
        f"manifest has changed since it was saved); delete {tmp_path / 'copy'} to start again"
    )
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["4", "8"]


def test_a_damaged_folder_that_cannot_be_renamed_is_an_error(two, tmp_path, monkeypatch):
    shutil.copytree(two[0], tmp_path / "copy")
    edit(tmp_path / "copy" / "8" / "notes" / "metadata")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with Checkpoints(tmp_path / "copy") as checkpoints:
        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(ConfigurationError, match=r"cannot be renamed to 8.damaged .*denied"):
            checkpoints.restore(two[1])


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        ValueError('PERMISSION_DENIED: "8/state/manifest.ocdbt": Permission denied'),
        OSError(24, "Too many open files"),
        MemoryError("Unable to allocate 9 GiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
    ],
    ids=lambda error: str(error)[:17],
)
def test_a_checkpoint_that_cannot_be_read_here_is_not_called_damaged(
    two, tmp_path, monkeypatch, error
):
    shutil.copytree(two[0], tmp_path / "copy")

    def fail(*_):
        raise error

    with Checkpoints(tmp_path / "copy") as checkpoints:
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "_read_state", fail)
            with pytest.raises(ConfigurationError, match="copy/8 cannot be read here .* left as i"):
                checkpoints.restore(two[1])
        assert int(checkpoints.restore(two[1])[0].step) == 8


@pytest.mark.parametrize("file", ["notes/metadata", "manifest/metadata", "state/_METADATA"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(two, tmp_path, file):
    shutil.copytree(two[0], tmp_path / "copy")
    (tmp_path / "copy" / "8" / file).unlink()
    os.mkfifo(tmp_path / "copy" / "8" / file)
    with (
        Checkpoints(tmp_path / "copy") as checkpoints,
        pytest.warns(match=rf"its {file} is neither a file nor a folder"),
    ):
        assert int(checkpoints.restore(two[1])[0].step) == 4


def test_a_folder_that_orbax_cannot_open_is_an_error_in_one_sentence(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "copy")
    (tmp_path / "copy" / "8" / "_CHECKPOINT_METADATA").write_text("[" * 100_000)
    with pytest.raises(ConfigurationError, match=r"cannot be kept in \S+copy: maximum recursion"):
        Checkpoints(tmp_path / "copy")


def test_what_is_set_aside_is_not_overwritten(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "copy")
    for name in ("8.damaged", "8.damaged-2"):
        (tmp_path / "copy" / name).mkdir()
    (tmp_path / "copy" / "8.damaged-3").symlink_to("nothing")
    edit(tmp_path / "copy" / "8" / "notes" / "metadata")
    warned = pytest.warns(match="kept as 8.damaged-4")
    with Checkpoints(tmp_path / "copy") as checkpoints, warned:
        checkpoints.restore(two[1])
    assert (tmp_path / "copy" / "8.damaged-4" / "state").exists()


def test_files_that_a_restored_state_does_not_need_may_be_missing(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "copy")
    (tmp_path / "copy" / "8" / "_CHECKPOINT_METADATA").unlink()
    (tmp_path / "copy" / "12").write_text("a file")
    (tmp_path / "copy" / "best").mkdir()
    with Checkpoints(tmp_path / "copy") as checkpoints:
        state, notes = checkpoints.restore(two[1])
    assert_same_bits(state, two[2])
    assert notes == {"saved": 8}


def test_only_who_saves_removes_unfinished_checkpoints(two, tmp_path):
    """Another process may be saving while this one reads."""
    shutil.copytree(two[0], tmp_path / "copy")
    unfinished = [tmp_path / "copy" / f"{step}.orbax-checkpoint-tmp" for step in (12, 16)]
    for path in unfinished:
        shutil.copytree(two[0] / "8", path)
    with Checkpoints(tmp_path / "copy") as checkpoints:
        state, _ = checkpoints.restore(two[1])
        assert all(path.exists() for path in unfinished)
        checkpoints.save(state._replace(step=state.step + 4))
        checkpoints.wait()
        assert checkpoints.steps == [8, 12] and not any(path.exists() for path in unfinished)


def test_a_checkpoint_that_was_removed_is_not_called_intact(two, tmp_path, monkeypatch):
    shutil.copytree(two[0], tmp_path / "copy")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_save", fail)
    with Checkpoints(tmp_path / "copy") as checkpoints:
        for left in (8, 4, None):
            with pytest.raises(SavingError) as caught:
                checkpoints.save(state_of({"w": jnp.ones(2)}, jnp.int32(12)))
            said = f"on device); that of step {left} is intact; free" if left else "device); free"
            assert said in str(caught.value)
            shutil.rmtree(tmp_path / "copy" / str(left), ignore_errors=True)
