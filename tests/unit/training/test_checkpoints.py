"""Checkpoints: the restored state has the bits of the saved one; an error is clear."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
from saved_states import as_numbers, assert_same_bits

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh, training
from jaxlocal.training.checkpoints import Checkpoints, SavingError, export

GRAD = jaxlocal.gradients(registry.loss, stateful=True)
OPTIMIZER = registry.OPTIMIZERS["adamw"]


@functools.cache
def round_fn_of(method, devices=8):
    """An entry of the registry, and its round in dispatches of one step each."""
    entry = registry.METHODS[method]
    mesh = make_mesh(entry.layout, jax.devices()[:devices])
    return entry, RoundFn(entry.build(GRAD, OPTIMIZER), entry.layout, mesh, max_chunk=2)


def start(round_fn):
    return round_fn.init(registry.params(), jax.random.key(1), registry.model_state())


def shapes(round_fn):
    return round_fn.shapes(registry.params(), registry.model_state())


def progress_of(round_fn, entry, state, steps=14, **options):
    batches = lambda first, count: registry.batches(entry.layout, first, count)
    return training.run(round_fn, state, batches, steps, measure_every=4, **options)


@pytest.mark.optimized
@pytest.mark.parametrize("method", ["diloco", "slowmo", "mll_sgd", "local_sgd-average"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(method, tmp_path):
    """States are restored from disk. Rounds of 4 steps run in dispatches of one step, so some
    checkpoints are within a round."""
    entry, round_fn = round_fn_of(method)
    whole, seen = {}, []
    with Checkpoints(tmp_path, keep=100) as checkpoints:
        for progress in progress_of(round_fn, entry, start(round_fn)):
            whole[progress.step] = as_numbers(progress.state)
            seen.append(progress._replace(state=None, loss=0.0))
            if progress.step:
                checkpoints.save(progress.state)
    steps = [progress.step for progress in seen]
    assert len(steps) >= 6 and any(step % 4 for step in steps[1:-1])
    for number in (1, 2, 3):
        shutil.rmtree(tmp_path / str(steps[-number]))  # the newest checkpoint left
        with Checkpoints(tmp_path, keep=100) as checkpoints:
            state, _ = checkpoints.restore(shapes(round_fn))
        begin = int(state.step)
        assert_same_bits(state, whole[begin])
        rest = []
        for progress in progress_of(round_fn, entry, state):
            rest.append(progress._replace(state=None, loss=0.0))
            assert_same_bits(progress.state, whole[progress.step])
        assert rest == seen[steps.index(begin) + 1 :]


def test_saving_does_not_wait_for_the_disk_and_saves_no_later_state(tmp_path):
    """The state is donated immediately after `save`, and its buffers are used again."""
    grad_fn = jaxlocal.gradients(lambda w, batch, key: -w.sum() * batch)
    method = jaxlocal.local_sgd(grad_fn, optax.sgd(1.0))
    round_fn = RoundFn(method, Layout(1, 8))
    state = round_fn.init(np.zeros((500, 500), np.float32), jax.random.key(0))
    ones = np.ones((1, 1, 8), np.float32)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for _ in range(3):
            state, _ = round_fn(state, ones)
            checkpoints.save(state)
            for _ in range(2):
                state, _ = round_fn(state, ones)
    for step in (7, 4, 1):
        with Checkpoints(tmp_path, keep=9) as checkpoints:
            restored, _ = checkpoints.restore(round_fn.shapes(np.zeros((500, 500), np.float32)))
        assert int(restored.step) == step and (np.asarray(restored.params) == step).all()
        shutil.rmtree(tmp_path / str(step))


def test_on_other_devices_the_numbers_are_equal_and_the_shardings_those_of_the_run(tmp_path):
    entry, eight = round_fn_of("diloco", 8)
    state, _ = eight(start(eight), registry.batches(entry.layout, 0, 4))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"seconds": 1.5, "names": ["a"]})
    saved = as_numbers(state)
    state, _ = eight(state, registry.batches(entry.layout, 4, 4))
    for devices in (1, 2, 8):
        _, round_fn = round_fn_of("diloco", devices)
        with Checkpoints(tmp_path) as checkpoints:
            restored, notes = checkpoints.restore(shapes(round_fn))
        assert notes == {"seconds": 1.5, "names": ["a"]}
        assert_same_bits(restored, saved)
        fresh = start(round_fn)
        for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(fresh), strict=True):
            assert one.sharding.is_equivalent_to(other.sharding, other.ndim)
            assert one.dtype == other.dtype
        restored, _ = round_fn(restored, registry.batches(entry.layout, 4, 4))
        for one, other in zip(
            jax.tree.leaves(as_numbers(restored)), jax.tree.leaves(as_numbers(state)), strict=True
        ):
            # Sums over devices round in another order; a bfloat16 may land on its neighbour.
            np.testing.assert_allclose(
                np.float32(one), np.float32(other), rtol=1e-2 if one.dtype.itemsize == 2 else 1e-4
            )


def test_the_newest_checkpoints_are_kept(tmp_path):
    entry, round_fn = round_fn_of("local_sgd", 1)
    state = start(round_fn)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in range(4):
            state, _ = round_fn(state, registry.batches(entry.layout, 4 * number, 4))
            checkpoints.save(state)
        checkpoints.wait()
        assert checkpoints.steps == [12, 16]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["12", "16"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("two")
    entry, round_fn = round_fn_of("diloco", 1)
    state = start(round_fn)
    with Checkpoints(folder) as checkpoints:
        for number in range(2):
            state, _ = round_fn(state, registry.batches(entry.layout, 4 * number, 4))
            checkpoints.save(state)
    return folder, round_fn


def test_the_error_for_a_checkpoint_of_another_run_names_the_difference(two):
    with Checkpoints(two[0]) as checkpoints:
        other = {**registry.params(), "matrix": jnp.zeros((4, 2))}
        with pytest.raises(ConfigurationError, match=r"3, 2\] for .*matrix, this run .*4, 2\]"):
            checkpoints.restore(two[1].shapes(other, registry.model_state()))
        _, plain = round_fn_of("local_sgd", 1)
        with pytest.raises(ConfigurationError, match=r"for anchor/matrix, this run nothing"):
            checkpoints.restore(shapes(plain))
        with pytest.raises(ConfigurationError, match="uint8.*this run int32"):
            counted = registry.model_state() | {"seen": jnp.uint8(0)}
            with Checkpoints(two[0].parent / "bytes") as others:
                others.save(two[1].init(registry.params(), jax.random.key(0), counted))
                others.wait()
                others.restore(shapes(two[1]))


def test_the_files_of_a_killed_writer_are_not_a_checkpoint(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "copy")
    shutil.copytree(two[0] / "8", tmp_path / "copy" / "12.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path / "copy") as checkpoints:
        assert checkpoints.steps == [4, 8]
        assert int(checkpoints.restore(shapes(two[1]))[0].step) == 8


def test_an_empty_folder_and_one_that_cannot_be_created_are_errors(two, tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ConfigurationError, match="no check"):
        checkpoints.restore(shapes(two[1]))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="file/inner"):
        Checkpoints(tmp_path / "file" / "inner")
    with pytest.raises(ConfigurationError, match="at least 1 checkpoint.*got 0"):
        Checkpoints(tmp_path, keep=0)
    for place in ("gs://bucket/run", "a\0b"):
        for call in (Checkpoints, lambda folder: export(folder, {"w": np.ones(1)}, {})):
            with pytest.raises(ConfigurationError, match="is not a folder of this machine"):
                call(place)


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_the_last_one_stays(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "copy")
    with Checkpoints(tmp_path / "copy") as checkpoints:
        state, _ = checkpoints.restore(shapes(two[1]))
        state, _ = two[1](state, registry.batches(registry.FLAT, 8, 4))
        moved = tmp_path / "moved"
        (tmp_path / "copy").rename(moved)
        (tmp_path / "copy").write_text("a file where the folder was")
        with pytest.raises(SavingError, match="could not be written"):
            checkpoints.save(state)
            checkpoints.wait()
    with Checkpoints(moved) as checkpoints:
        assert int(checkpoints.restore(shapes(two[1]))[0].step) == 8
