"""Payloads have the bits of their formula, in arrays of the dtypes that cross the wire."""

import math

import jax
import jax.numpy as jnp
import pytest
import registry
from hypothesis import given
from hypothesis import strategies as st
from mixed_trees import DENSE, KEY, SPECS, mixed, tree_bytes

from jaxlocal.compression import parse, payload_bits


def ceil(a, b):
    return math.ceil(a / b)


# Bits of n values of some width. Buckets share a float32: 64 values in qsgd, 1024 in int8. A
# payload of two_bit has four levels.
VALUE_BITS = {
    "": lambda n, width: n * width,
    "sign": lambda n, width: 8 * ceil(n, 8) + 32,
    "two_bit": lambda n, width: 8 * ceil(2 * n, 8) + 4 * 32,
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
    if options[1:] == ["model"]:  # promoted to float32; indices below 5367 need 16 bits
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


FORMULAS = [spec for spec in SPECS if spec not in registry.COMPRESSORS]


@pytest.mark.parametrize("spec", [*FORMULAS, "qsgd:2", "qsgd:8"])
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
        ("two_bit", {"uint8", "float32"}),
        ("qsgd:4", {"uint8", "float32"}),
        ("int8", {"int8", "float32"}),
        ("bfloat16", {"bfloat16"}),
        ("top_k:8+int8", {"int8", "float32", "uint16"}),
        ("top_k:8+two_bit", {"uint8", "float32", "uint16"}),
        ("grbs:8+bfloat16", {"bfloat16"}),
    ],
)
def test_the_payload_has_the_dtypes_that_are_counted(spec, dtypes):
    payload = jax.eval_shape(lambda x: parse(spec).encode(x, (), KEY), jnp.ones(5000))
    assert {str(x.dtype) for x in jax.tree.leaves(payload)} == dtypes


@pytest.mark.parametrize("n, dtype", [(256, "uint8"), (257, "uint16"), (65536, "uint16")])
def test_indices_have_the_smallest_dtype_that_fits(n, dtype):
    code = parse("top_k:16:tensor")
    payload = jax.eval_shape(lambda x: code.encode(x, (), KEY), jnp.zeros(n))
    assert payload[0].index.dtype == dtype


def test_values_have_the_dtype_of_their_leaf():
    half = parse("grbs:2").encode(jnp.ones(64, jnp.bfloat16), (), KEY)
    assert jax.tree.leaves(half)[0].dtype == jnp.bfloat16


ARGUMENTS = st.one_of(
    *[st.builds(f"{name}:{{}}".format, st.floats(1, 50)) for name in ("grbs", "random_k", "top_k")],
    *[
        st.builds(f"{name}:{{}}+{{}}".format, st.floats(1, 50), st.sampled_from(DENSE))
        for name in ("grbs", "random_k", "top_k")
    ],
    st.builds("top_k:{}:{}".format, st.floats(1, 50), st.sampled_from(["tensor", "model"])),
    st.builds("powersgd:{}".format, st.integers(1, 9)),
    st.sampled_from([*DENSE, *registry.COMPRESSORS, "identity", "zero"]),
)
SHAPES = st.lists(st.lists(st.integers(0, 20), max_size=3), max_size=3)


@given(ARGUMENTS, SHAPES, st.sampled_from(["float32", "bfloat16"]))
def test_no_tree_takes_more_bits_than_uncompressed(spec, shapes, dtype):
    code = parse(spec)._replace(init=lambda like: _any_memory(spec, like))
    like = [jax.ShapeDtypeStruct(tuple(shape), dtype) for shape in shapes]
    assert payload_bits(code, like) <= 8 * tree_bytes(like)
    assert 0 <= code.delta(like) <= 1


def _any_memory(spec, like):
    """The memory of a compressor, also where its `init` refuses the tree."""
    wide = jnp.zeros((99, 99)) if spec.startswith("powersgd") else jnp.zeros(99)
    memory = parse(spec).init([*like, wide])
    return memory and memory[:-1]
