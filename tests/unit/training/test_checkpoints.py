"""Checkpoints: the restored state has the bits of the saved one; a damaged one is never used."""

import functools
import importlib.util
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.flax import load_file

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh, training
from jaxlocal.training.checkpoints import Checkpoints, SavingError, export
from jaxlocal.training.digests import digests
from jaxlocal.types import Memory, RoundMemory, TrainState

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


def as_numbers(tree):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    raw = lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x).copy()
    return jax.tree.map(raw, tree)


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, as_numbers(one), as_numbers(other))


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
            checkpoints.save(state, {"saved": int(state.step)})
        restored = as_numbers(state)
    return folder, round_fn, restored


def truncate(path):
    for part in [path] if path.is_file() else path.iterdir():
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def edit(path):
    path.write_text(path.read_text().replace("8", "9"))


DAMAGES = {
    "a truncated tree": (truncate, "state/_METADATA", "Unterminated string"),
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
            state, notes = checkpoints.restore(shapes(two[1]))
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
            assert int(checkpoints.restore(shapes(two[1]))[0].step) == 4


def test_a_renamed_folder_is_not_taken_for_its_step(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "copy")
    (tmp_path / "copy" / "8").rename(tmp_path / "copy" / "12")
    warned = pytest.warns(match=r"copy/12 is damaged \(it holds step 8\)")
    with Checkpoints(tmp_path / "copy") as checkpoints, warned:
        assert int(checkpoints.restore(shapes(two[1]))[0].step) == 4


def test_damage_without_an_older_checkpoint_is_an_error_that_says_how_to_start_again(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "copy")
    for step in ("4", "8"):
        edit(tmp_path / "copy" / step / "manifest" / "metadata")
    raised = pytest.raises(ConfigurationError)
    with Checkpoints(tmp_path / "copy") as checkpoints, raised as caught:
        checkpoints.restore(shapes(two[1]))
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
            checkpoints.restore(shapes(two[1]))


def test_what_is_set_aside_is_not_overwritten(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "copy")
    for name in ("8.damaged", "8.damaged-2"):
        (tmp_path / "copy" / name).mkdir()
    edit(tmp_path / "copy" / "8" / "notes" / "metadata")
    warned = pytest.warns(match="kept as 8.damaged-3")
    with Checkpoints(tmp_path / "copy") as checkpoints, warned:
        checkpoints.restore(shapes(two[1]))
    assert (tmp_path / "copy" / "8.damaged-3" / "state").exists()


def test_files_that_a_restored_state_does_not_need_may_be_missing(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "copy")
    (tmp_path / "copy" / "8" / "_CHECKPOINT_METADATA").unlink()
    (tmp_path / "copy" / "12").write_text("a file")
    (tmp_path / "copy" / "best").mkdir()
    with Checkpoints(tmp_path / "copy") as checkpoints:
        state, notes = checkpoints.restore(shapes(two[1]))
    assert_same_bits(state, two[2])
    assert notes == {"saved": 8}


def state_of(params, step=3):
    """A state of these parameters; nothing is compiled."""
    return TrainState(params, (), {}, (), RoundMemory(Memory(), Memory()), jax.random.key(0), step)


def shapes_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def test_every_kind_of_leaf_is_restored_to_the_bit(tmp_path):
    of = lambda kind: jnp.arange(12).astype(kind).reshape(2, 2, 3)
    kinds = [bool, "int4", "int8", "uint8", "int32", "uint32", "float16", "bfloat16", "float32"]
    kinds += ["float8_e4m3fn", "float8_e5m2", "complex64"]
    params = {str(kind): of(kind) for kind in kinds} | {
        "keys": jax.random.split(jax.random.key(1), (2, 2)),
        "rbg": jax.random.split(jax.random.key(1, impl="rbg"), (2, 2)),
        "empty": {"float": jnp.zeros((2, 2, 0, 3)), "int": jnp.zeros((2, 2, 0), jnp.int32)},
        "scalars": jnp.ones((2, 2)),
        "-0": jnp.full((2, 2, 3), -0.0),
        "NaN": jnp.uint32([[[0x7FC12345, 0xFFC00001, 0x7F800000]] * 2] * 2).view(jnp.float32),
        "": (of("float32"), [of("int32")]),
        "a.b/c": of("float32"),
    }
    state = state_of(params, jnp.int32(3))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        restored, _ = checkpoints.restore(shapes_of(state))
    for one, other in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    bits = lambda tree: [x.tobytes() for x in jax.tree.leaves(as_numbers(tree))]
    assert bits(restored) == bits(state)


REFUSED = {
    "a type that TensorStore does not know": (
        {"w": jnp.zeros((1, 1), "uint4")},
        "w has the .*uint4",
    ),
    "names that are one on disk": (
        {"a/b": jnp.zeros((1, 1)), "a": {"b": jnp.ones((1, 1))}},
        r"params\['a'\]\['b'\] and .*params\['a/b'\] have the same name",
    ),
    "names that Orbax writes as one": (
        {"a.b": jnp.zeros((1, 1)), "a": {"b": jnp.ones((1, 1))}},
        "have the same name on disk, params/a/b",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_that_would_not_be_restored_are_refused(tmp_path, name):
    params, why = REFUSED[name]
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ConfigurationError, match=why):
        checkpoints.save(state_of(params, jnp.int32(3)))
    assert not list(tmp_path.iterdir())


EXACT = {"x": -0.0, "big": 2**70, "tiny": 5e-324, "": ["é\n\ud800", {"": [True, None, 1, 1.0]}]}


def test_notes_are_restored_exactly_or_refused(tmp_path):
    state = state_of({"w": jnp.zeros((1, 1))}, jnp.int32(3))
    with Checkpoints(tmp_path) as checkpoints:
        for value, what in [
            ((1, 2), "a tuple"),
            ({1: 2}, "the key 1"),
            ([{"a": np.float32(1)}], "a float32"),
            (np.int64(1), "a int64"),
            (np.ones(2), "a ndarray"),
            (b"x", "a bytes"),
        ]:
            with pytest.raises(ConfigurationError, match=f"note 'n' holds {what}, which JSON"):
                checkpoints.save(state, {"ok": 1, "n": value})
        checkpoints.save(state, EXACT | {"nan": float("nan"), "far": -math.inf})
        _, notes = checkpoints.restore(shapes_of(state))
    assert math.isnan(notes.pop("nan")) and notes.pop("far") == -math.inf
    assert repr(notes) == repr(EXACT)


def test_digests_do_not_depend_on_the_devices():
    """A state on one device, on eight, and with workers that are divided over devices."""
    x = {"w": np.arange(2 * 4 * 6, dtype=np.float32).reshape(2, 4, 6), "b": np.ones((2, 4))}
    keys = jax.random.split(jax.random.key(1), (2, 4))
    found = []
    for sizes, spec in [((1, 1), ()), ((2, 4), ("hubs", "workers")), ((1, 4), (None, "workers"))]:
        mesh = jax.make_mesh(sizes, ("hubs", "workers"), axis_types=(AxisType.Auto,) * 2)
        put = lambda tree, m=mesh, s=spec: jax.device_put(tree, NamedSharding(m, P(*s)))
        found.append(digests(state_of(put(x | {"keys": keys}), jnp.int32(3))))
    mesh = jax.make_mesh((2, 2, 2), ("hubs", "workers", "model"), axis_types=(AxisType.Auto,) * 3)
    spread = jax.device_put(x["w"], NamedSharding(mesh, P("hubs", "workers", "model")))
    rest = jax.tree.map(jnp.asarray, {"b": x["b"], "keys": keys})
    found.append(digests(state_of({"w": spread} | rest, jnp.int32(3))))
    assert found[0] == found[1] == found[2] == found[3]
    moved = spread.at[0, 0].set(spread[0, 1]).at[0, 1].set(spread[0, 0])  # two workers swapped
    swapped = digests(state_of({"w": moved} | rest, jnp.int32(3)))
    assert [name for name in swapped if swapped[name] != found[0][name]] == ["params/w"]


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


def test_a_good_checkpoint_with_a_list_where_the_run_has_a_dict_is_not_called_damaged(tmp_path):
    one = jnp.ones((1, 1, 2))
    states = [state_of(params, jnp.int32(3)) for params in ([one], {"0": one}, {0: one}, (one,))]
    for number, (saved, other, why) in enumerate(
        [
            (states[0], states[1], r"it has params/\[0\] and not params/0, as this run has"),
            (states[1], states[0], r"it has params/0 and not params/\[0\], as this run has"),
        ]
    ):
        with Checkpoints(tmp_path / str(number)) as checkpoints:
            checkpoints.save(saved)
            with pytest.raises(ConfigurationError, match=f"belongs to another run: {why}"):
                checkpoints.restore(shapes_of(other))
            assert checkpoints.steps == [3]
    with Checkpoints(tmp_path / "tuple") as checkpoints:
        checkpoints.save(states[0])
        assert isinstance(checkpoints.restore(shapes_of(states[3]))[0].params, tuple)
        rbg = states[0]._replace(key=jax.random.key(0, impl="rbg"))
        with pytest.raises(ConfigurationError, match="key<fry>.* for key, this run key<rbg>"):
            checkpoints.restore(shapes_of(rbg))


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


def test_the_exported_model_is_read_by_orbax_and_safetensors(tmp_path):
    import orbax.checkpoint as ocp

    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3, jnp.bfloat16)}}
    statistics = {"norm": {"mean": jnp.arange(3.0)}}
    for factor in (1, 2):  # the second replaces the first
        scaled = jax.tree.map(lambda x, f=factor: f * x, params)
        written = export(tmp_path, scaled, statistics)
        assert [path.name for path in written] == ["model", "model.safetensors"]
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "model")
        assert_same_bits(restored, {"params": scaled, "model_state": statistics})
    (tmp_path / "model.safetensors").rename(tmp_path / "m")
    header = (tmp_path / "m").read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert names["params/dense/bias"]["dtype"] == "BF16"
    export(tmp_path, {"w": np.full((2, 2), 7, np.float32)}, {})
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["params/w"], 7)


def test_every_kind_of_leaf_is_exported_as_it_is(tmp_path):
    import orbax.checkpoint as ocp

    kinds = {bool: "BOOL", "int8": "I8", "uint32": "U32", "float16": "F16", "bfloat16": "BF16"}
    kinds |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64"}
    kinds |= {"float64": "F64"}
    params = {
        name: np.arange(6).reshape(2, 3).astype(jnp.dtype(kind)) for kind, name in kinds.items()
    }
    params |= {"F32": jnp.ones(()), "I64": np.array([2**53 + 1])}
    more = {"turned": np.arange(6.0).reshape(2, 3).T, "scalar": np.float64(3), "number": 2.5}
    export(tmp_path, params, more)
    data = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "model")
    for part, values in [("params", params), ("model_state", more)]:
        for name, x in values.items():
            x, entry = np.asarray(x), header[f"{part}/{name}"]
            begin, end = entry["data_offsets"]
            assert entry["dtype"] == (name if part == "params" else "F64")
            assert entry["shape"] == list(x.shape)
            assert data[start:][begin:end] == x.tobytes()
            assert np.asarray(restored[part][name]).tobytes() == x.tobytes()


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"key": jax.random.key(0)}, "params/key holds random keys"),
        ({"w": np.zeros(2, "complex128")}, "params/w has the dtype complex128, which safetensors"),
        ({"w": jnp.zeros(2, "int4")}, "params/w has the dtype int4"),
        ({"w": jnp.zeros(2, "float8_e4m3b11fnuz")}, "params/w has the dtype float8_e4m3b11fnuz"),
        ({"w": "text"}, "params/w has the dtype <U4"),
        ([np.zeros((0, 3))], r"params/\[0\] of shape \[0, 3\] has no values, which Orbax"),
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, "have the same name on disk, params/a/b"),
        ({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, "have the same name on disk, params/a/b"),
        ({"a/0": np.ones(1), "a": [np.ones(1)]}, "have the same name on disk, params/a/0"),
    ],
)
def test_what_an_export_cannot_hold_is_refused_before_anything_is_written(tmp_path, params, why):
    with pytest.raises(ConfigurationError, match=why):
        export(tmp_path / "export", params, {})
    assert not (tmp_path / "export").exists()


def fail(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "writer", ["safetensors.numpy.save_file", "orbax.checkpoint.StandardCheckpointer"]
)
def test_an_export_that_fails_leaves_the_one_before(tmp_path, monkeypatch, writer):
    export(tmp_path, {"w": np.ones(2)}, {})
    with monkeypatch.context() as patched:
        patched.setattr(writer, fail)
        with pytest.raises(SavingError) as caught:
            export(tmp_path, {"w": np.zeros(2)}, {})
    assert str(caught.value) == (
        f"the model could not be written to {tmp_path}: [Errno 28] No space left on device; free "
        f"space there, then try again"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.safetensors"]
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["params/w"], 1)
    export(tmp_path, {"w": np.full(2, 3.0)}, {})
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["params/w"], 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.safetensors"]


def test_an_export_that_was_killed_between_two_renames_is_put_back(tmp_path):
    export(tmp_path, {"w": np.ones(2)}, {})
    (tmp_path / "part").mkdir()
    (tmp_path / "model").rename(tmp_path / "part" / "old")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("orbax.checkpoint.StandardCheckpointer", fail)
        with pytest.raises(SavingError):
            export(tmp_path, {"w": np.zeros(2)}, {})
    assert (tmp_path / "model" / "_METADATA").exists()


def test_a_package_that_is_not_installed_is_named_with_what_installs_it(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    for missing, call in [
        ("orbax", lambda: Checkpoints(tmp_path)),
        ("orbax", lambda: export(tmp_path, {"w": np.ones(2)}, {})),
        ("safetensors", lambda: export(tmp_path, {"w": np.ones(2)}, {})),
    ]:
        lacking = lambda name, *rest, m=missing: None if name == m else find(name, *rest)
        monkeypatch.setattr(importlib.util, "find_spec", lacking)
        with pytest.raises(ConfigurationError, match=rf"need {missing}.*'jaxlocal\[experiments\]'"):
            call()
    assert not list(tmp_path.iterdir())
