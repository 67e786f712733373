"""What a checkpoint holds, it gives back to the bit; what it cannot hold is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from saved_states import as_numbers, shapes_of, state_of

from jaxlocal import ConfigurationError
from jaxlocal.training.checkpoints import Checkpoints
from jaxlocal.training.digests import digests


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
