"""Pooling equals that of Flax in value and gradient, also for equal entries."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxlocal.nn import avg_pool, max_pool


def digits(shape, dtype=jnp.float32, seed=0):
    """Few different values, so that most windows hold their maximum more than once."""
    return jnp.asarray(np.random.default_rng(seed).integers(-1, 2, shape), dtype)


def value_and_gradient(pool, image):
    value, pullback = jax.vjp(pool, image)
    cotangent = jnp.arange(1, value.size + 1, dtype=value.dtype).reshape(value.shape)
    return value, pullback(cotangent)[0]


def assert_equals_flax(image, *args, jit=jax.jit, **options):
    def both(image):
        for pool in (max_pool, nnx.max_pool):
            yield value_and_gradient(lambda x, pool=pool: pool(x, *args, **options), image)

    for ours, theirs in zip(*jit(lambda image: tuple(both(image)))(image), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours, float), np.asarray(theirs, float))


sizes = st.integers(1, 3)


def flax_avg_pool(*args):
    with jax.numpy_dtype_promotion("standard"):  # it divides by an integer
        return nnx.avg_pool(*args)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    sides=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    window=st.tuples(sizes, sizes),
    strides=st.one_of(st.none(), st.tuples(sizes, sizes)),
    padding=st.sampled_from(["VALID", "SAME", ((0, 0), (0, 0)), ((1, 0), (0, 1))]),
    tiles=st.booleans(),
)
def test_equals_flax(batch, sides, window, strides, padding, tiles):
    image = digits((batch, *sides, 2))
    assert_equals_flax(image, window, window if tiles else strides, padding)


@pytest.mark.parametrize(
    ("shape", "dimensions"),
    [((6, 3), 1), ((2, 6, 3), 1), ((4, 6, 2), 2), ((3, 2, 4, 6, 2), 2), ((2, 4, 4, 4, 3), 3)],
)
def test_every_number_of_dimensions(shape, dimensions):
    """Without a batch, with a batch, and with a batch of batches."""
    window = (2,) * dimensions
    assert_equals_flax(digits(shape), window, window)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_dtypes(dtype):
    with jax.enable_x64(True):
        assert_equals_flax(digits((2, 4, 6, 3), dtype), (2, 2), (2, 2))


def test_integers_and_large_windows_are_pooled_by_flax():
    assert_equals_flax(digits((2, 10, 10, 1)), (5, 5), (5, 5))
    image = digits((2, 4, 4, 3), jnp.int32)
    np.testing.assert_array_equal(
        max_pool(image, (2, 2), (2, 2)), nnx.max_pool(image, (2, 2), (2, 2))
    )


def test_ties_send_the_gradient_to_the_first_maximum():
    image = jnp.array([[1.0, 3.0, 0.0, 0.0], [3.0, 3.0, 0.0, 0.0]]).reshape(1, 2, 4, 1)
    gradient = jax.jit(jax.grad(lambda x: max_pool(x, (2, 2), (2, 2)).sum()))(image)
    expected = [[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    np.testing.assert_array_equal(gradient[0, :, :, 0], expected)


def test_the_last_row_and_column_of_odd_sides_are_dropped():
    image = digits((1, 5, 7, 2))
    assert max_pool(image, (2, 2), (2, 2)).shape == (1, 2, 3, 2)
    assert_equals_flax(image, (2, 2), (2, 2), "VALID", jit=lambda run: run)


def test_windows_and_strides_may_be_lists():
    image = digits((1, 4, 4, 2))
    for strides in ([2, 2], [1, 2]):
        expected = nnx.max_pool(image, (2, 2), tuple(strides))
        np.testing.assert_array_equal(max_pool(image, [2, 2], strides), expected)
        expected = flax_avg_pool(image, (2, 2), tuple(strides))
        np.testing.assert_array_equal(avg_pool(image, [2, 2], strides), expected)


@pytest.mark.parametrize("strides", [(2, 2), (1, 1)])
@pytest.mark.parametrize(("ours", "theirs"), [(max_pool, nnx.max_pool), (avg_pool, flax_avg_pool)])
def test_vmap_map_and_shard_map(ours, theirs, strides):
    images = digits((4, 2, 4, 6, 3))

    def gradients(pool, over):
        def one(image):
            return jax.grad(lambda x: (pool(x, (2, 2), strides) ** 2).sum())(image)

        return over(one)(images)

    def vmapped(one):
        return jax.jit(jax.vmap(one))

    def mapped(one):
        return jax.jit(partial(lax.map, one))

    def sharded(one):
        mesh = Mesh(np.array(jax.devices()[:1]), ("workers",), axis_types=(AxisType.Auto,))
        specs = {"in_specs": P("workers"), "out_specs": P("workers")}
        return jax.jit(jax.shard_map(mapped(one), mesh=mesh, **specs))

    expected = gradients(theirs, one_by_one)
    for over in (vmapped, mapped, sharded):
        np.testing.assert_array_equal(gradients(ours, over), expected)


def one_by_one(one):
    return lambda images: jnp.stack([*map(jax.jit(one), images)])
