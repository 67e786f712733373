"""Every kind of leaf in parameters, model state and optimizer state."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh
from jaxlocal.communication import mixing
from jaxlocal.parallel import CONTEXT, SINGLE, STACKED, collectives, over_mesh
from jaxlocal.parallel.leaves import check_same

KEY = jax.random.key(0)
LAYOUT = Layout(1, 4, weights=[1, 2, 3, 2])


def refused(message):
    return pytest.raises(ConfigurationError, match=re.escape(message))


@functools.cache
def round_fn():
    method = jaxlocal.local_sgd(problems.grad_fn, optax.sgd(0.1), period=1, model_state="average")
    return RoundFn(method, LAYOUT, make_mesh(LAYOUT, shape=(1, 2)))


@pytest.mark.parametrize(
    ("leaf", "described", "remedy"),
    [
        (jnp.int32(0), "int32[]", "keep it in the model state"),
        (3, "int32[]", "keep it in the model state"),
        (np.zeros(2, np.uint8), "uint8[2]", "keep it in the model state"),
        (np.zeros((), bool), "bool[]", "keep it in the model state"),
        (1j * np.ones(3), "complex64[3]", "hold its real and its imaginary parts as two arrays"),
        (KEY, "key<fry>[]", "keep it in the model state"),
        (jnp.ones(1, jnp.float8_e4m3fn), "float8_e4m3fn[1]", "hold it in bfloat16 at least"),
        ("text", "str", "leave it out of the parameters"),
        (np.array(["text"]), "ndarray of <U4", "leave it out of the parameters"),
        (np.ones(2, np.longdouble), "ndarray of float128", "leave it out of the parameters"),
        (object, "type", "leave it out of the parameters"),
    ],
)
@pytest.mark.parametrize("start", ["init", "shapes"])
def test_parameters_of_another_kind_are_refused_by_name(leaf, described, remedy, start):
    params = {"first": jnp.ones(2), "second": [leaf]}
    with refused(f"and params/second/0 is {described}; {remedy}"):
        round_fn().init(params, KEY) if start == "init" else round_fn().shapes(params)


def test_what_is_no_array_is_refused_in_a_model_state():
    with refused("model_state/name must be an array or a number, got str"):
        round_fn().init(problems.START, KEY, {"name": "resnet"})


@pytest.mark.parametrize(
    "params",
    [0.5, np.float64(0.5), np.ones((2, 0)), jnp.ones((), jnp.float16), jnp.ones(3, jnp.bfloat16)],
)
def test_real_floating_point_numbers_of_any_shape_are_parameters(params):
    shapes = round_fn().shapes({"w": params}).params["w"]
    assert shapes.shape == (1, 4, *np.shape(params)) and jnp.issubdtype(shapes.dtype, jnp.floating)


def different(*rows):
    """A leaf [1, 4, ...] whose rows are those of the workers."""
    return jnp.stack([jnp.asarray(row) for row in rows])[None]


EXACT = {
    "bool": different(False, True, False, False),
    "int8": different(*np.array([-128, 3, -5, 4], np.int8)),
    "int32": different(16777217, 16777216, 5, 2**31 - 1),
    "int4": different(*jnp.array([-8, 7, 3, 0], jnp.int4)),
    "uint32": different(*np.array([16777217, 2**32 - 1, 0, 5], np.uint32)),
    "no values": jnp.zeros((1, 4, 0, 3), jnp.int32),
    "many": jnp.arange(8, dtype=jnp.int32).reshape(1, 4, 2),
}
AVERAGED = {
    "float32": different(1.0, 2.0, 3.0, 4.0),
    "half": different(*jnp.array([1.0, 2.0, 3.0, 4.0], jnp.bfloat16)),
    "float16": different(*jnp.array([1.0, 2.0, 3.0, 4.0], jnp.float16)),
    "float8": different(*jnp.array([1.0, 2.0, 3.0, 4.0], jnp.float8_e4m3fn)),
    "complex": different(*np.array([1 + 1j, 2, 3, 4 - 4j], np.complex64)),
    "no values": jnp.zeros((1, 4, 0)),
    "half, no values": jnp.zeros((1, 4, 2, 0), jnp.bfloat16),
}
KEYS = {"key": jax.random.split(KEY, 4)[None], "keys": jax.random.split(KEY, (1, 4, 3))}


def assert_same(one, other):
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(np.asarray(data(one)), np.asarray(data(other)))


@pytest.fixture(scope="module")
def mean():
    """The mean of states of every kind, over two devices."""
    state = round_fn().init(problems.START, KEY)
    return round_fn().mean(state._replace(model_state={**EXACT, **KEYS, "averaged": AVERAGED}))[1]


@pytest.mark.parametrize("name", EXACT)
def test_the_mean_of_integers_and_bools_is_the_largest_exactly(mean, name):
    assert_same(mean[name], np.asarray(EXACT[name]).max((0, 1)).astype(EXACT[name].dtype))


@pytest.mark.parametrize("name", KEYS)
def test_the_mean_of_random_keys_is_that_of_worker_0(mean, name):
    assert_same(mean[name], KEYS[name][0, 0])


@pytest.mark.parametrize("name", AVERAGED)
def test_the_mean_of_all_else_is_the_weighted_average_in_the_type_of_the_leaf(mean, name):
    leaf = AVERAGED[name]
    wide = np.asarray(leaf.astype(np.complex64))
    expected = np.einsum("dn,dn...->...", LAYOUT.weight, wide)
    assert mean["averaged"][name].dtype == leaf.dtype
    # float8 has three bits after the point; 2.75 is 1.011₂ · 2.
    np.testing.assert_allclose(mean["averaged"][name].astype(np.complex64), expected, rtol=1e-3)


MIXERS = {
    "mean": (mixing.mean(), LAYOUT),
    "hub_mean": (mixing.hub_mean(), Layout(2, 2)),
    "hub_diffusion": (mixing.hub_diffusion(np.full((4, 4), 0.25)), Layout(4, 1)),
    "ring": (mixing.hub_diffusion(np.roll(np.eye(4), 1, 0) / 2 + np.eye(4) / 2), Layout(4, 1)),
    "from_matrix": (mixing.from_matrix(np.full((4, 4), 0.25)), Layout(1, 4)),
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_averages_leaves_without_values_and_scalars_of_all_widths(mixer):
    averages, layout = MIXERS[mixer]
    tree = {
        name: jnp.ones((*layout.shape, *shape), dtype)
        for name, shape, dtype in [
            ("none", (0, 3), jnp.float32),
            ("half, none", (2, 0), jnp.bfloat16),
            ("scalar", (), jnp.float16),
            ("complex", (2,), jnp.complex64),
            ("matrix", (2, 3), jnp.float32),
        ]
    }
    mixed = problems.mix(averages, tree, layout, make_mesh(layout).devices.shape)
    for name, x in tree.items():
        assert_same(mixed[name], np.asarray(x))


def test_no_leaves_are_at_consensus_and_complex_ones_are_apart():
    layout, one = Layout(1, 2), make_mesh(Layout(1, 2), shape=(1, 1))
    distance = over_mesh(collectives.consensus_distance, one, (STACKED, CONTEXT), SINGLE)
    assert float(distance({}, layout.context())) == 0
    assert float(distance({"count": jnp.zeros((1, 2), int)}, layout.context())) == 0
    apart = {"z": jnp.array([[1j, -1j]]), "none": jnp.zeros((1, 2, 0))}
    assert float(distance(apart, layout.context())) == 1


def test_in_64_bits_averages_and_integers_keep_theirs():
    with jax.enable_x64(True):
        layout = Layout(1, 2)
        mesh = make_mesh(layout, shape=(1, 2))
        mean = over_mesh(collectives.mean, mesh, (STACKED, CONTEXT), SINGLE)
        tree = {
            "float64": jnp.array([[1.0, 1 + 2.0**-50]]),
            "int64": jnp.array([[2**53 + 1, 2**53]]),
            "uint64": jnp.array([[2**64 - 1, 0]], jnp.uint64),
        }
        got = mean(tree, layout.context())
        assert {x.dtype.name for x in got.values()} == set(tree)
        assert got["float64"] == 1 + 2.0**-51
        assert got["int64"] == 2**53 + 1 and int(got["uint64"]) == 2**64 - 1
        mixed = problems.mix(mixing.mean(), {"x": tree["float64"]}, layout, (1, 2))
        np.testing.assert_array_equal(mixed["x"], [[1 + 2.0**-51] * 2])
        distance = over_mesh(collectives.consensus_distance, mesh, (STACKED, CONTEXT), SINGLE)
        assert float(distance({"x": tree["float64"]}, layout.context())) == 2.0**-51


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"w": np.ones(3)}, {"w": np.ones(1)}, "w is float32[3] there, and float32[1] here"),
        ({"w": np.ones(3)}, {"v": np.ones(3)}, "w is float32[3] there, and nothing here"),
        (np.ones(3), np.ones(3, np.int32), "the leaf is float32[3] there, and int32[3] here"),
        ({"a": [0.5]}, {"a": (0.5,)}, "the tree is PyTreeDef({'a': [*]}) there"),
        ({"a": 0.5}, {"a": None}, "a is float32[] there, and nothing here"),
        ({}, {"a": 0.5}, "a is nothing there, and float32[] here"),
    ],
)
def test_a_tree_of_another_form_is_refused_with_its_first_leaf_that_differs(before, after, message):
    with refused(f"the update must be like the parameters: {message}"):
        check_same("the update", "the parameters", before, after)
