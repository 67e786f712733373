"""An exported model has the arrays of the model, or is refused before anything is written."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file
from saved_states import assert_same_bits

from jaxlocal import ConfigurationError
from jaxlocal.training.checkpoints import Checkpoints, SavingError, export


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
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model").rename(tmp_path / "model.part" / "old")
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
