"""Every compressor on trees of mixed leaves: bits, types, contraction, conservation, averages."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxlocal.compression import identity, parse, payload_bits, zero

SPARSE = ["grbs:8", "random_k:8", "random_k:2.5", "top_k:8", "top_k:8:tensor", "top_k:8:model"]
DENSE = ["sign", "qsgd:5", "int8", "bfloat16"]
CODED = ["grbs:8+qsgd:4", "random_k:8+bfloat16", "top_k:8+int8", "top_k:8:model+sign"]
ONE_MESSAGE = ["identity", "zero", *SPARSE, *DENSE, *CODED]
SPECS = [*ONE_MESSAGE, "powersgd:2"]
KEY = jax.random.key(7)


def mixed(seed: int = 0):
    """A scalar, a bias, a matrix, a kernel, a long vector, bfloat16, integers and nothing."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "bias": normal(10),
        "count": jnp.arange(3, dtype=jnp.int32),
        "half": normal(33).astype(jnp.bfloat16),
        "kernel": normal(3, 3, 4, 8),
        "long": normal(5000),
        "matrix": normal(7, 5),
        "nothing": jnp.zeros((0, 4)),
        "scalar": normal(),
    }


def said(code, tree, memory, key, heard=lambda payload: payload):
    """The whole payload of a tree, as the decoder gets it."""
    payload = code.encode(tree, memory, key)
    if code.second is None:
        return payload
    known = code.second.settle(heard(payload))
    return {**known, **code.second.encode(tree, known, key)}


@functools.cache
def decoder(spec):
    return jax.jit(parse(spec).decode)


@functools.cache
def speaker(spec):
    code = parse(spec)
    return jax.jit(lambda tree, key: said(code, tree, code.init(tree), key))


def heard(spec, payload, key, like):
    """C(x), as float32."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    return decoder(spec)(payload, key, zeros, 1.0)


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def differs(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)


def assert_close(one, other, rtol=1e-6, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        as_float64(one),
        as_float64(other),
    )


def ceil(a, b):
    return math.ceil(a / b)


# Bits of n values of some width. Buckets share a float32: 64 values in qsgd, 1024 in int8.
VALUE_BITS = {
    "": lambda n, width: n * width,
    "sign": lambda n, width: 8 * ceil(n, 8) + 32,
    "qsgd:2": lambda n, width: 8 * ceil(2 * n, 8) + 32 * ceil(n, 64),
    "qsgd:4": lambda n, width: 8 * ceil(4 * n, 8) + 32 * ceil(n, 64),
    "qsgd:5": lambda n, width: 8 * ceil(5 * n, 8) + 32 * ceil(n, 64),
    "qsgd:8": lambda n, width: 8 * n + 32 * ceil(n, 64),
    "int8": lambda n, width: 8 * n + 32 * ceil(n, 1024),
    "bfloat16": lambda n, width: 16 * n,
}
# Values and width of each of the leaves: bias, half, kernel, long, matrix, scalar.
FLOATS = [(10, 32), (33, 16), (288, 32), (5000, 32), (35, 32), (1, 32)]
INTEGERS = 3 * 32


def expected_bits(spec: str) -> int:
    name, *options = spec.split("+")[0].split(":")
    values = VALUE_BITS[spec.split("+")[1] if "+" in spec else ""]
    if name == "zero":
        return 0
    if name == "identity":
        return INTEGERS + sum(n * width for n, width in FLOATS)
    if name == "powersgd":  # the kernel is a matrix [36, 8]
        return INTEGERS + 32 * (2 * (36 + 8) + 2 * (7 + 5) + 10 + 5000 + 1) + 16 * 33
    if spec in VALUE_BITS:
        return INTEGERS + sum(min(VALUE_BITS[spec](n, w), n * w) for n, w in FLOATS)
    ratio = float(options[0])
    if options[1:] == ["model"]:  # promoted to float32; 5367 places need 16 bits
        k = ceil(sum(n for n, _ in FLOATS), ratio)
        return INTEGERS + values(k, 32) + 16 * k
    total = INTEGERS
    for n, width in FLOATS:
        if name != "top_k":
            bits = values(ceil(n, ratio), width)
        elif options[1:] == ["tensor"]:
            bits = values(ceil(n, ratio), width) + ceil(n, ratio) * (8 if n <= 256 else 16)
        else:  # 5000 values are two chunks of 2500
            chunks, length = (2, 2500) if n == 5000 else (1, n)
            k = chunks * ceil(length, ratio)
            bits = values(k, width) + k * (8 if length <= 256 else 16)
        total += min(bits, n * width)
    return total


@pytest.mark.parametrize("spec", [*SPECS, "qsgd:2", "qsgd:8"])
def test_bits_are_those_of_the_formula(spec):
    code, tree = parse(spec), mixed()
    assert payload_bits(code, tree) == expected_bits(spec)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert payload_bits(code, shapes) == expected_bits(spec)


@pytest.mark.parametrize(
    "spec, dtypes",
    [
        ("grbs:8", {"float32"}),
        ("random_k:8", {"float32"}),
        ("top_k:8", {"float32", "uint16"}),
        ("sign", {"uint8", "float32"}),
        ("qsgd:4", {"uint8", "float32"}),
        ("int8", {"int8", "float32"}),
        ("bfloat16", {"bfloat16"}),
        ("top_k:8+int8", {"int8", "float32", "uint16"}),
        ("grbs:8+bfloat16", {"bfloat16"}),
    ],
)
def test_the_payload_has_its_real_types(spec, dtypes):
    payload = jax.eval_shape(lambda x: parse(spec).encode(x, (), KEY), jnp.ones(5000))
    assert {str(x.dtype) for x in jax.tree.leaves(payload)} == dtypes


@pytest.mark.parametrize("n, dtype", [(256, "uint8"), (257, "uint16"), (65536, "uint16")])
def test_indices_have_the_smallest_type_that_fits(n, dtype):
    code = parse("top_k:16:tensor")
    payload = jax.eval_shape(lambda x: code.encode(x, (), KEY), jnp.zeros(n))
    assert payload[0].index.dtype == dtype


def test_values_have_the_type_of_their_leaf():
    half = parse("grbs:2").encode(jnp.ones(64, jnp.bfloat16), (), KEY)
    assert jax.tree.leaves(half)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("spec", SPECS)
def test_sent_and_residual_are_the_whole(spec):
    tree = mixed()
    payload = speaker(spec)(tree, KEY)
    residual, sent = decoder(spec)(payload, KEY, tree, -1.0), heard(spec, payload, KEY, tree)
    for name, x in tree.items():
        assert residual[name].dtype == x.dtype and residual[name].shape == x.shape
        whole = np.float64(sent[name]) + np.float64(residual[name])
        if spec in SPARSE or spec in ("identity", "zero"):
            np.testing.assert_array_equal(whole, np.float64(x))
            assert not (np.float64(residual[name]) * np.float64(sent[name])).any()
        else:  # one rounding in the leaf's type, of a residual of a few units
            rounding = 0 if x.dtype == np.int32 else 8 * float(jnp.finfo(x.dtype).eps)
            np.testing.assert_allclose(whole, np.float64(x), rtol=0, atol=rounding)


@pytest.mark.parametrize("spec", SPECS)
def test_small_and_integer_leaves_arrive_exactly(spec):
    tree = mixed()
    sent = heard(spec, speaker(spec)(tree, KEY), KEY, tree)
    if spec != "zero":
        np.testing.assert_array_equal(sent["count"], tree["count"])
    if spec != "zero" and "bfloat16" not in spec and "model" not in spec:
        np.testing.assert_array_equal(sent["scalar"], tree["scalar"])


@pytest.mark.parametrize("spec", SPECS)
def test_a_message_is_a_function_of_its_key(spec):
    tree, code, other_key = mixed(), parse(spec), jax.random.key(8)
    one, other = speaker(spec)(tree, KEY), speaker(spec)(tree, other_key)
    assert not differs(one, speaker(spec)(tree, KEY))
    sent = heard(spec, one, KEY, tree), heard(spec, other, other_key, tree)
    assert differs(*sent) == any(name in spec for name in ("grbs", "random_k", "qsgd"))
    if not code.shared_mask:  # the decoder's key is not the encoder's
        assert not differs(sent[0], heard(spec, one, other_key, tree))


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_said_as_nothing(spec):
    tree = mixed()
    payload = speaker(spec)(jax.tree.map(jnp.zeros_like, tree), KEY)
    assert not differs(decoder(spec)(payload, KEY, tree, 1.0), tree)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if parse(spec).averageable])
def test_the_average_of_messages_is_a_message_of_the_average(spec):
    code, trees = parse(spec), [mixed(seed) for seed in range(3)]
    mean = lambda trees: jax.tree.map(lambda *x: sum(x) / len(x), *trees)
    payloads = [speaker(spec)(tree, KEY) for tree in trees]
    if code.second:
        first = mean([code.encode(tree, code.init(tree), KEY) for tree in trees])
        payloads = [said(code, tree, code.init(tree), KEY, lambda own: first) for tree in trees]
    sent = mean([as_float64(heard(spec, payload, KEY, trees[0])) for payload in payloads])
    average = heard(spec, mean(payloads), KEY, trees[0])
    for name, x in trees[0].items():  # an average of bfloat16s is rounded to one
        rounding = 4 * float(jnp.finfo(x.dtype).eps) if x.dtype != np.int32 else 1e-6
        np.testing.assert_allclose(average[name], sent[name], rtol=0, atol=rounding)


def test_which_may_be_averaged_and_which_masks_are_shared():
    assert [s for s in SPECS if parse(s).averageable] == [
        *("identity", "zero", "grbs:8", "random_k:8", "random_k:2.5", "powersgd:2")
    ]
    shared = [s for s in SPECS if parse(s).shared_mask]
    assert shared == [
        *("identity", "zero", "grbs:8", "random_k:8", "random_k:2.5"),
        *("grbs:8+qsgd:4", "random_k:8+bfloat16"),
    ]
    assert [s for s in SPECS if parse(s).unbiased] == [
        *("identity", "grbs:8", "random_k:8", "random_k:2.5"),
        *("qsgd:5", "bfloat16", "grbs:8+qsgd:4", "random_k:8+bfloat16"),
    ]


@pytest.mark.parametrize(
    "spec", ["identity", "zero", "grbs:8", "random_k:8", "top_k:8:model", "qsgd:5", "powersgd:2"]
)
def test_compiled_and_batched_it_is_the_same(spec):
    code, scale = parse(spec), -0.5
    trees = [{k: mixed(seed)[k] for k in ("bias", "matrix")} for seed in range(2)]
    memory = code.init(trees[0])

    @jax.jit
    def together(stacked, scale):
        payload = jax.vmap(lambda tree: said(code, tree, memory, KEY))(stacked)
        own = jax.vmap(lambda p, x: code.decode(p, KEY, x, scale))(payload, stacked)
        first_payload, first = jax.tree.map(lambda x: x[0], (payload, stacked))
        one_payload = jax.vmap(lambda x: code.decode(first_payload, KEY, x, scale))(stacked)
        if spec == "zero":  # its payload has nothing to map over
            return own, one_payload
        return own, one_payload, jax.vmap(lambda p: code.decode(p, KEY, first, scale))(payload)

    results = together(jax.tree.map(lambda *x: jnp.stack(x), *trees), scale)
    payloads = [said(code, tree, memory, KEY) for tree in trees]
    for i in range(2):
        pairs = [(payloads[i], trees[i]), (payloads[0], trees[i]), (payloads[i], trees[0])]
        for result, (payload, onto) in zip(results, pairs, strict=False):
            one = jax.tree.map(lambda x, i=i: x[i], result)
            assert_close(one, code.decode(payload, KEY, onto, scale))


@pytest.mark.parametrize("spec", ["grbs:8", "top_k:8+int8", "qsgd:4", "powersgd:2"])
def test_inside_a_scan_on_a_mesh(spec):
    code, tree = parse(spec), {"a": mixed()["matrix"], "b": mixed()["bias"]}
    mesh = jax.make_mesh((2,), ("workers",), (jax.sharding.AxisType.Auto,))

    def residual(x):
        return code.decode(said(code, x, code.init(x), KEY), KEY, x, -1.0)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("workers"), out_specs=P("workers"))
    def twice(stacked):
        step = lambda x, _: (jax.vmap(residual)(x), None)
        return jax.lax.scan(step, stacked, length=2)[0]

    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree)
    result = jax.jit(twice)(stacked)
    assert_close(jax.tree.map(lambda x: x[0], result), residual(residual(tree)), atol=1e-5)


VECTORS = {
    "one_hot": lambda n, rng: np.eye(n)[0],
    "last_hot": lambda n, rng: np.eye(n)[-1],
    "constant": lambda n, rng: np.ones(n),
    "two_scales": lambda n, rng: np.where(np.arange(n) % 9, 1e-3, 1e3),
    "tiny": lambda n, rng: 1e-30 * rng.normal(size=n),
    "normal": lambda n, rng: rng.normal(size=n),
    "heavy": lambda n, rng: rng.standard_cauchy(size=n),
}


SHORT = [*SPARSE, *CODED, "grbs:5.5", "top_k:3+qsgd:3", "identity", "zero", "sign"]


@pytest.mark.parametrize(
    "spec, n", [*((s, 37) for s in SHORT), *((s, 1100) for s in [*DENSE, "qsgd:2", "top_k:8"])]
)
def test_the_contraction_is_what_delta_says(spec, n):
    code = parse(spec)
    delta = code.delta(jnp.zeros(n))
    assert 0 <= delta <= 1
    rng = np.random.default_rng(0)
    xs = np.stack([make(n, rng) for make in VECTORS.values()]).astype(np.float32)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    @functools.partial(jax.vmap, in_axes=(0, None))
    def residual(x, key):
        return code.decode(code.encode(x, (), key), key, x, -1.0)

    keys = jax.random.split(KEY, 400)
    # Norms in float64: the squares of tiny values are none in float32.
    left = np.float64(residual(xs, keys)) ** 2
    shares = left.sum(-1) / (np.float64(xs) ** 2).sum(-1)  # [keys, vectors]
    # Four standard errors, and the rounding of values and scales.
    margin = 4 * shares.std(axis=0) / np.sqrt(len(keys)) + 1e-6
    assert (shares.mean(axis=0) <= 1 - delta + margin).all(), dict(
        zip(VECTORS, shares.mean(axis=0), strict=True)
    )


@pytest.mark.parametrize("spec", SPECS)
def test_the_delta_of_a_tree_is_that_of_its_worst_tensor(spec):
    code, tree = parse(spec), mixed()
    if "model" in spec or spec == "zero":
        return
    leaves = [x for x in tree.values() if not spec.startswith("powersgd") or x.ndim > 1]
    leaves = [x for x in leaves if x.size]
    assert code.delta(tree) == min(code.delta([x]) for x in leaves)


@pytest.mark.parametrize("spec", SPECS)
def test_trees_of_nothing(spec):
    code = parse(spec)
    for tree in ({}, {"a": jnp.zeros((0, 3))}, {"a": jnp.arange(4)}):
        payload = said(code, tree, code.init(tree), KEY)
        doubled = jax.tree.map(lambda x: x if spec == "zero" else 2 * x, tree)
        assert not differs(code.decode(payload, KEY, tree, 1.0), doubled)
        assert payload_bits(code, tree) == (0 if spec == "zero" else 8 * _bytes(tree))
        assert code.delta(tree) == (0.0 if spec == "zero" else 1.0)


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


ARGUMENTS = st.one_of(
    *[st.builds(f"{name}:{{}}".format, st.floats(1, 50)) for name in ("grbs", "random_k", "top_k")],
    *[
        st.builds(f"{name}:{{}}+{{}}".format, st.floats(1, 50), st.sampled_from(DENSE))
        for name in ("grbs", "random_k", "top_k")
    ],
    st.builds("top_k:{}:{}".format, st.floats(1, 50), st.sampled_from(["tensor", "model"])),
    st.builds("powersgd:{}".format, st.integers(1, 9)),
    st.sampled_from([*DENSE, "identity", "zero"]),
)
SHAPES = st.lists(st.lists(st.integers(0, 20), max_size=3), max_size=3)


@given(ARGUMENTS, SHAPES, st.sampled_from(["float32", "bfloat16"]))
def test_no_tree_costs_more_than_plain(spec, shapes, dtype):
    code = parse(spec)._replace(init=lambda like: _any_memory(spec, like))
    like = [jax.ShapeDtypeStruct(tuple(shape), dtype) for shape in shapes]
    assert payload_bits(code, like) <= 8 * _bytes(like)
    assert 0 <= code.delta(like) <= 1


def _any_memory(spec, like):
    """The memory of a compressor also where its `init` would refuse the tree."""
    wide = jnp.zeros((99, 99)) if spec.startswith("powersgd") else jnp.zeros(99)
    memory = parse(spec).init([*like, wide])
    return memory and memory[:-1]


@pytest.mark.parametrize("spec", ["grbs:8", "top_k:8", "sign", "qsgd:4", "int8", "powersgd:2"])
def test_float64_is_computed_in_float64(spec):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 30)))
        code = parse(spec)

        @jax.jit
        def both(x):
            payload = said(code, x, code.init(x), KEY)
            zeros = jnp.zeros_like(x)
            return code.decode(payload, KEY, zeros, 1.0), code.decode(payload, KEY, x, -1.0)

        sent, residual = both(x)
        assert residual.dtype == sent.dtype == jnp.float64
        np.testing.assert_allclose(sent + residual, x, rtol=0, atol=1e-14)
        assert spec in ("sign", "qsgd:4") or not np.array_equal(sent, np.float32(sent))


@pytest.mark.parametrize("spec", SPECS)
def test_a_message_is_read_onto_leaves_of_any_type(spec):
    tree = mixed()
    payload = speaker(spec)(tree, KEY)
    sent = heard(spec, payload, KEY, tree)
    other = {"half": jnp.float16, "long": jnp.float16, "matrix": jnp.bfloat16}
    onto = {k: jnp.ones(x.shape, other.get(k, jnp.float32)) for k, x in tree.items()}
    result = decoder(spec)(payload, KEY, onto, 2.0)
    for name, x in result.items():
        assert x.dtype == onto[name].dtype
        expected = 1 + 2 * np.float64(sent[name])
        np.testing.assert_allclose(np.float64(x), expected, rtol=0.01, atol=0.01)


def test_identity_and_zero():
    tree = mixed()
    assert not differs(heard("identity", identity().encode(tree, (), KEY), KEY, tree), tree)
    assert jax.tree.leaves(zero().encode(tree, (), KEY)) == []
    assert identity().delta(tree) == 1.0 and zero().delta(tree) == 0.0
    assert math.isinf(zero().ratio) and identity().ratio == 1.0
