"""The convolution equals that of JAX in value and gradient, wherever it may stand."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxlocal.nn import conv_general_dilated

LAYOUT = ("NHWC", "HWIO", "NHWC")
STACKED, COMMON = P("hubs", "workers"), P()


def digits(shape, dtype=jnp.float32, seed=0):
    """Small whole numbers: their sums of products are exact, in any order, so equal means equal."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), dtype)


def value_and_gradients(convolve, image, kernel):
    value, pullback = jax.vjp(convolve, image, kernel)
    return value, pullback(digits(value.shape, value.dtype, 2))


def assert_same(ours, theirs):
    def one(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))

    jax.tree.map(one, ours, theirs)


def assert_equals_lax(image, kernel, strides, padding, jit=jax.jit, **options):
    options.setdefault("dimension_numbers", LAYOUT)

    def both(image, kernel):
        for convolve in (conv_general_dilated, lax.conv_general_dilated):
            convolve = partial(convolve, window_strides=strides, padding=padding, **options)
            yield value_and_gradients(convolve, image, kernel)

    assert_same(*jit(lambda *args: tuple(both(*args)))(image, kernel))


pads = st.integers(0, 3)
paddings = st.one_of(
    st.sampled_from(["SAME", "VALID", "SAME_LOWER"]),
    st.tuples(st.tuples(pads, pads), st.tuples(pads, pads)),
)
sides = st.tuples(st.integers(1, 5), st.integers(1, 5))
channels = st.integers(1, 3)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    image=st.tuples(st.integers(1, 3), st.integers(5, 9), st.integers(5, 9), channels),
    sides=sides,
    outs=channels,
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=paddings,
)
def test_value_and_gradients_equal_lax(image, sides, outs, strides, padding):
    kernel = digits((*sides, image[3], outs), seed=1)
    assert_equals_lax(digits(image), kernel, strides, padding)


@pytest.mark.parametrize(
    ("image", "kernel", "strides", "padding"),
    [
        ((2, 8, 8, 3), (1, 1, 3, 4), (2, 2), "VALID"),  # the last row and column are never read
        ((2, 9, 8, 3), (2, 3, 3, 4), (4, 3), "VALID"),  # several of them
        ((2, 8, 8, 3), (3, 3, 3, 4), (2, 2), ((1, 1), (1, 1))),  # padding that is never read
        ((2, 6, 6, 2), (2, 2, 2, 3), (1, 1), ((4, 0), (0, 5))),  # padding wider than the kernel
        ((2, 6, 6, 2), (3, 3, 2, 3), (1, 2), ((-1, 0), (1, -2))),  # padding that crops
        ((2, 3, 3, 2), (4, 4, 2, 3), (1, 1), "VALID"),  # no output at all
        ((0, 6, 6, 2), (3, 3, 2, 3), (1, 1), "SAME"),  # no example
    ],
)
def test_corners_equal_lax(image, kernel, strides, padding):
    assert_equals_lax(digits(image), digits(kernel, seed=1), strides, padding)


@pytest.mark.parametrize(
    ("dtype", "result_type"),
    [
        (jnp.bfloat16, None),
        (jnp.bfloat16, jnp.float32),
        (jnp.float64, None),
        (jnp.float32, jnp.float64),
        (jnp.float16, None),
    ],
)
def test_dtypes_equal_lax(dtype, result_type):
    with jax.enable_x64(True):
        image, kernel = digits((2, 6, 5, 3), dtype), digits((3, 2, 3, 4), dtype, 1)
        assert_equals_lax(image, kernel, (2, 1), "SAME", preferred_element_type=result_type)


@pytest.mark.parametrize("precision", ["highest", lax.Precision.HIGH, ("default", "highest")])
def test_precision_is_passed_on(precision):
    image, kernel = digits((2, 6, 5, 3)), digits((3, 2, 3, 4), seed=1)
    assert_equals_lax(image, kernel, (1, 1), "SAME", precision=precision)


@pytest.mark.parametrize(
    ("image", "kernel", "options"),
    [
        ((2, 3, 8, 8), (4, 3, 3, 3), {"dimension_numbers": None}),
        ((2, 8, 8, 4), (3, 3, 2, 4), {"feature_group_count": 2}),
        ((4, 8, 8, 3), (3, 3, 3, 4), {"batch_group_count": 2}),
        ((2, 8, 8, 3), (3, 3, 3, 4), {"rhs_dilation": (2, 1)}),
        ((2, 8, 8, 3), (3, 3, 3, 4), {"lhs_dilation": (1, 2)}),
    ],
)
def test_other_convolutions_are_those_of_lax(image, kernel, options):
    assert_equals_lax(digits(image), digits(kernel, seed=1), (1, 1), ((1, 1), (1, 1)), **options)


def test_one_and_three_dimensions_are_those_of_lax():
    for layout, spatial in ((("NWC", "WIO", "NWC"), 1), (("NDHWC", "DHWIO", "NDHWC"), 3)):
        image, kernel = (
            digits((2,) + (5,) * spatial + (3,)),
            digits((3,) * spatial + (3, 2), seed=1),
        )
        strides = (1,) * spatial
        assert_equals_lax(image, kernel, strides, "SAME", dimension_numbers=layout)


def test_mistakes_are_those_of_lax():
    image, kernel = digits((2, 6, 6, 3)), digits((3, 3, 4, 2))
    with pytest.raises((TypeError, ValueError), match="feature"):
        conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def test_without_jit():
    image, kernel = digits((2, 5, 5, 2)), digits((3, 3, 2, 3), seed=1)
    assert_equals_lax(image, kernel, (2, 2), "SAME", jit=lambda run: run)


def test_reverse_mode_twice():
    image, kernel = digits((1, 4, 4, 2)), digits((3, 3, 2, 2), seed=1)

    def second(convolve):
        convolve = partial(
            convolve, window_strides=(2, 1), padding="SAME", dimension_numbers=LAYOUT
        )

        def loss(image, kernel):
            return (convolve(image, kernel) ** 3).sum()

        def slope(image, kernel):
            return sum(g.sum() for g in jax.grad(loss, (0, 1))(image, kernel))

        return jax.jit(jax.grad(slope, (0, 1)))(image, kernel)

    assert_same(second(conv_general_dilated), second(lax.conv_general_dilated))


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
def test_vmap(axes):
    images, kernels = digits((3, 2, 5, 6, 2)), digits((3, 3, 2, 2, 4), seed=1)
    images, kernels = (
        a[0] if axis is None else a for a, axis in zip((images, kernels), axes, strict=True)
    )

    def run(convolve):
        convolve = partial(
            convolve, window_strides=(2, 1), padding="SAME", dimension_numbers=LAYOUT
        )
        one = partial(value_and_gradients, convolve)
        return jax.jit(jax.vmap(one, in_axes=axes))(images, kernels)

    assert_same(run(conv_general_dilated), run(lax.conv_general_dilated))


def test_loops():
    images, kernels = digits((3, 2, 5, 6, 2)), digits((3, 3, 2, 2, 4), seed=1)

    def run(convolve):
        convolve = partial(
            convolve, window_strides=(1, 2), padding="SAME", dimension_numbers=LAYOUT
        )

        def one(pair):
            return value_and_gradients(convolve, *pair)

        def tick(kernel, image):
            _, (_, by_kernel) = one((image, kernel))
            return kernel - by_kernel, ()

        mapped = jax.jit(partial(lax.map, one))((images, kernels))
        return mapped, jax.jit(partial(lax.scan, tick))(kernels[0], images)[0]

    assert_same(run(conv_general_dilated), run(lax.conv_general_dilated))


@pytest.mark.parametrize(
    ("image_spec", "kernel_spec"),
    [
        (STACKED, STACKED),
        (STACKED, COMMON),
        (COMMON, STACKED),
        (COMMON, COMMON),
        (P("hubs"), P(None, "workers")),
    ],
)
def test_shard_map(image_spec, kernel_spec):
    """A common operand's gradient comes out common, summed over the devices, as that of lax."""
    devices = np.array(jax.devices())[:, None]
    mesh = Mesh(devices, ("hubs", "workers"), axis_types=(AxisType.Auto,) * 2)
    images, kernels = (
        digits((len(devices), 1, 2, 5, 6, 2)),
        digits((len(devices), 1, 3, 2, 2, 4), seed=1),
    )

    def run(convolve):
        def per_device(images, kernels):
            def loss(image, kernel):
                return (
                    convolve(image, kernel, (2, 1), "SAME", dimension_numbers=LAYOUT) ** 2
                ).sum()

            def tick(carry, _):
                by_image, by_kernel = jax.grad(loss, (0, 1))(images[0, 0], carry)
                return carry - by_kernel, by_image[None, None]

            kernel, by_images = lax.scan(tick, kernels[0, 0], None, length=2)
            return kernel[None, None], by_images[0]

        specs = (image_spec, kernel_spec)
        mapped = jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=specs[::-1])
        return jax.jit(mapped)(images, kernels)

    assert_same(run(conv_general_dilated), run(lax.conv_general_dilated))


def test_flax_layers_take_it():
    images = digits((2, 6, 6, 3))
    ours, theirs = (
        nnx.Conv(3, 4, (3, 3), conv_general_dilated=convolve, rngs=nnx.Rngs(0))
        for convolve in (conv_general_dilated, lax.conv_general_dilated)
    )
    assert_same(ours(images), theirs(images))
    ours, theirs = (
        linen.Conv(4, (3, 3), conv_general_dilated=convolve)
        for convolve in (conv_general_dilated, lax.conv_general_dilated)
    )
    variables = theirs.init(jax.random.key(0), images)
    assert_same(ours.apply(variables, images), theirs.apply(variables, images))


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="only XLA:CPU needs canonical convolutions"
)
def test_gradients_in_a_loop_compile_to_canonical_convolutions():
    """XLA:CPU has its fast kernel for `b01f_01io->b01f` only; lax's weight gradient is another."""
    image, kernel = digits((2, 6, 6, 3)), digits((3, 3, 3, 3), seed=1)

    def layouts(convolve):
        def loss(kernel):
            hidden = convolve(image, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
            return (convolve(hidden, kernel, (2, 2), "SAME", dimension_numbers=LAYOUT) ** 2).sum()

        def train(kernel):
            return lax.fori_loop(0, 3, lambda _, kernel: kernel - jax.grad(loss)(kernel), kernel)

        program = jax.jit(train).lower(kernel).compile().as_text()
        assert "conditional" not in program
        return set(re.findall(r"dim_labels=(\w+->\w+)", program))

    assert layouts(conv_general_dilated) == {"b01f_01io->b01f"}
    assert layouts(lax.conv_general_dilated) != {"b01f_01io->b01f"}
