"""Small tensors of one shape are compressed as one batch, with the numbers of each alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixed_trees import DENSE, KEY, whole_payload

from jaxlocal.compression import parse, payload_bits
from jaxlocal.compression.batches import SMALL, batches_by_shape, cut, join

NO_DRAWS = [*(spec for spec in DENSE if "qsgd" not in spec), "top_k:8", "top_k:4+two_bit"]


def trees():
    """Three tensors of one shape, one of as many values, and another."""
    rng = np.random.default_rng(0)
    shapes = [(8, 12), (5,), (8, 12), (12, 8), (8, 12)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@functools.cache
def both(spec):
    """C(x) and x − C(x)."""
    code = parse(spec)

    @jax.jit
    def run(tree):
        payload = whole_payload(code, tree, code.init(tree), KEY)
        zeros = jax.tree.map(jnp.zeros_like, tree)
        return code.decode(payload, KEY, zeros, 1.0), code.decode(payload, KEY, tree, -1.0)

    return run


@pytest.mark.parametrize("spec", NO_DRAWS)
def test_tensors_of_one_size_are_compressed_as_each_alone(spec):
    sent, residual = both(spec)(trees())
    for i, x in enumerate(trees()):
        alone = both(spec)([x, jnp.ones(97)])  # which top_k:8 needs beside five values
        np.testing.assert_allclose(sent[i], alone[0][0], rtol=1e-6)
        np.testing.assert_allclose(residual[i], alone[1][0], rtol=1e-5, atol=1e-6)


def test_matrices_of_one_shape_are_projected_as_each_alone():
    """With as many columns as the matrices have, a projection is the matrix itself."""
    low = [jnp.outer(x[:, 0], x[0]) for x in trees() if x.shape == (8, 12)]
    for x, sent in zip(low, both("powersgd:1")(low)[0], strict=True):
        np.testing.assert_allclose(sent, x, atol=1e-5)


@pytest.mark.parametrize("spec", ["grbs:8", "random_k:8", "qsgd:4", "top_k:8", "sign"])
@pytest.mark.parametrize("first", [math.nan, -math.inf, -0.0, 1e-45])
def test_no_value_moves_tensors_to_other_places(spec, first):
    """The places in a batch seem to follow from a value, whose bits may be any."""
    xs = trees()
    xs[0] = xs[0].at[0, 0].set(first)
    sent, residual = both(spec)(xs)
    expected = both(spec)(trees())
    for i in range(1, len(xs)):
        np.testing.assert_array_equal(sent[i], expected[0][i])
        np.testing.assert_array_equal(residual[i], expected[1][i])


def test_tensors_of_a_batch_draw_their_own_masks():
    tree = [jnp.ones(64)] * 8
    sent = both("grbs:8")(tree)[0]
    starts = [int(np.flatnonzero(x)[0]) for x in sent]
    assert all(np.count_nonzero(x) == 8 for x in sent) and len(set(starts)) > 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.uint32, jnp.int8])
def test_join_is_a_concatenation_which_cut_undoes(dtype):
    vectors = [jnp.arange(n).astype(dtype) for n in (3, 0, 5, 3)]
    whole = jax.jit(join)(vectors)
    assert whole.dtype == dtype
    np.testing.assert_array_equal(whole, np.concatenate([np.asarray(x) for x in vectors]))
    for x, part in zip(vectors, jax.jit(lambda x: cut(x, (3, 0, 5, 3)))(whole), strict=True):
        np.testing.assert_array_equal(part, x)


def test_join_and_cut_can_be_batched_over_some_arguments():
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.arange(2.0)
    joined = jax.vmap(lambda x: join([x, y]))(x)
    np.testing.assert_array_equal(joined, np.concatenate([x, np.stack([y, y])], axis=1))
    parts = jax.vmap(lambda x: cut(x, [1, 4]))(joined)
    np.testing.assert_array_equal(parts[0], joined[:, :1])
    np.testing.assert_array_equal(parts[1], joined[:, 1:])


def test_large_arrays_are_batches_of_their_own():
    small, large = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((SMALL + 1,), "f4")
    assert batches_by_shape([small, large, small, large]) == [[0, 2], [1], [3]]


@pytest.mark.parametrize("spec", [*NO_DRAWS, "grbs:8", "powersgd:2"])
def test_a_batch_has_as_many_bits_as_its_tensors(spec):
    tree = [x for x in trees() if x.shape == (8, 12)]
    assert payload_bits(parse(spec), tree) == 3 * payload_bits(parse(spec), tree[:1])
