"""What is decoded of a tree of mixed leaves: conservation, dtypes, keys, averages."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixed_trees import (
    KEY,
    SPARSE,
    SPECS,
    as_float64,
    decoded,
    decoder,
    differs,
    encoder,
    mixed,
    tree_bytes,
    whole_payload,
)

from jaxlocal.compression import identity, parse, payload_bits, zero


@pytest.mark.parametrize("spec", SPECS)
def test_sent_part_and_residual_sum_to_the_tree(spec):
    tree = mixed()
    payload = encoder(spec)(tree, KEY)
    residual, sent = decoder(spec)(payload, KEY, tree, -1.0), decoded(spec, payload, KEY, tree)
    for name, x in tree.items():
        assert residual[name].dtype == x.dtype and residual[name].shape == x.shape
        whole = np.float64(sent[name]) + np.float64(residual[name])
        if spec in SPARSE or spec in ("identity", "zero"):
            np.testing.assert_array_equal(whole, np.float64(x))
            assert not (np.float64(residual[name]) * np.float64(sent[name])).any()
        else:  # one rounding in the leaf's dtype, of a residual of a few units
            rounding = 0 if x.dtype == np.int32 else 8 * float(jnp.finfo(x.dtype).eps)
            np.testing.assert_allclose(whole, np.float64(x), rtol=0, atol=rounding)


@pytest.mark.parametrize("spec", SPECS)
def test_small_and_integer_leaves_are_sent_exactly(spec):
    tree = mixed()
    sent = decoded(spec, encoder(spec)(tree, KEY), KEY, tree)
    if spec != "zero":
        np.testing.assert_array_equal(sent["count"], tree["count"])
    if spec != "zero" and "bfloat16" not in spec and "model" not in spec:
        np.testing.assert_array_equal(sent["scalar"], tree["scalar"])


@pytest.mark.parametrize("spec", SPECS)
def test_a_payload_is_a_function_of_its_key(spec):
    tree, code, other_key = mixed(), parse(spec), jax.random.key(8)
    one, other = encoder(spec)(tree, KEY), encoder(spec)(tree, other_key)
    assert not differs(one, encoder(spec)(tree, KEY))
    sent = decoded(spec, one, KEY, tree), decoded(spec, other, other_key, tree)
    assert differs(*sent) == any(name in spec for name in ("grbs", "random_k", "qsgd"))
    if not code.shared_mask:  # the decoder's key is not the encoder's
        assert not differs(sent[0], decoded(spec, one, other_key, tree))


@pytest.mark.parametrize("spec", SPECS)
def test_zeros_are_decoded_as_zeros(spec):
    tree = mixed()
    payload = encoder(spec)(jax.tree.map(jnp.zeros_like, tree), KEY)
    assert not differs(decoder(spec)(payload, KEY, tree, 1.0), tree)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if parse(spec).averageable])
def test_the_average_of_payloads_is_the_payload_of_the_average(spec):
    code, trees = parse(spec), [mixed(seed) for seed in range(3)]
    mean = lambda trees: jax.tree.map(lambda *x: sum(x) / len(x), *trees)
    payloads = [encoder(spec)(tree, KEY) for tree in trees]
    if code.second:
        first = mean([code.encode(tree, code.init(tree), KEY) for tree in trees])
        of_all = lambda payload: first
        payloads = [whole_payload(code, tree, code.init(tree), KEY, of_all) for tree in trees]
    sent = mean([as_float64(decoded(spec, payload, KEY, trees[0])) for payload in payloads])
    average = decoded(spec, mean(payloads), KEY, trees[0])
    for name, x in trees[0].items():  # an average of bfloat16s is rounded to one
        rounding = 4 * float(jnp.finfo(x.dtype).eps) if x.dtype != np.int32 else 1e-6
        np.testing.assert_allclose(average[name], sent[name], rtol=0, atol=rounding)


def test_which_payloads_are_averaged_and_which_masks_are_shared():
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


@pytest.mark.parametrize("spec", SPECS)
def test_empty_trees_and_trees_without_floating_values(spec):
    code = parse(spec)
    for tree in ({}, {"a": jnp.zeros((0, 3))}, {"a": jnp.arange(4)}):
        payload = whole_payload(code, tree, code.init(tree), KEY)
        doubled = jax.tree.map(lambda x: x if spec == "zero" else 2 * x, tree)
        assert not differs(code.decode(payload, KEY, tree, 1.0), doubled)
        assert payload_bits(code, tree) == (0 if spec == "zero" else 8 * tree_bytes(tree))
        assert code.delta(tree) == (0.0 if spec == "zero" else 1.0)


@pytest.mark.parametrize("spec", SPECS)
def test_a_payload_is_decoded_onto_leaves_of_any_dtype(spec):
    tree = mixed()
    payload = encoder(spec)(tree, KEY)
    sent = decoded(spec, payload, KEY, tree)
    other = {"half": jnp.float16, "long": jnp.float16, "matrix": jnp.bfloat16}
    onto = {k: jnp.ones(x.shape, other.get(k, jnp.float32)) for k, x in tree.items()}
    result = decoder(spec)(payload, KEY, onto, 2.0)
    for name, x in result.items():
        assert x.dtype == onto[name].dtype
        expected = 1 + 2 * np.float64(sent[name])
        np.testing.assert_allclose(np.float64(x), expected, rtol=0.01, atol=0.01)


def test_identity_and_zero():
    tree = mixed()
    assert not differs(decoded("identity", identity().encode(tree, (), KEY), KEY, tree), tree)
    assert jax.tree.leaves(zero().encode(tree, (), KEY)) == []
    assert identity().delta(tree) == 1.0 and zero().delta(tree) == 0.0
    assert math.isinf(zero().ratio) and identity().ratio == 1.0
