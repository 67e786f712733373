"""The convolution equals that of JAX in value and gradients, for all shapes and options."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from exactly import assert_equal_functions, assert_same
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from plain_layers import LAYOUT, digits

from jaxlocal.nn import conv_general_dilated
from jaxlocal.nn.convolution import why_slow
from jaxlocal.nn.forms import FEW_CHANNELS, SMALL_IMAGE

LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: LAYOUT, 3: ("NDHWC", "DHWIO", "NDHWC")}
MANY = FEW_CHANNELS


def assert_equals_lax(image, kernel, strides, padding, jit=jax.jit, **options):
    options.setdefault("dimension_numbers", LAYOUTS.get(image.ndim - 2))
    assert_equal_functions(
        *(
            partial(convolve, window_strides=strides, padding=padding, **options)
            for convolve in (conv_general_dilated, lax.conv_general_dilated)
        ),
        image,
        kernel,
        jit=jit,
    )


@st.composite
def convolutions(draw):
    """(image, kernel, strides, padding, options) of one to three dimensions."""
    spatial = draw(st.integers(1, 3))

    def each(least, most):
        return draw(st.tuples(*[st.integers(least, most)] * spatial))

    groups, ins, outs = draw(st.sampled_from([(1, 3, 2), (1, 1, MANY), (1, MANY, 3), (2, 2, 2)]))
    image = (draw(st.integers(1, 2)), *each(4, 7), groups * ins)
    kernel = (*each(1, 4), ins, groups * outs)
    options = {"rhs_dilation": each(1, 2), "feature_group_count": groups}
    padding = draw(st.sampled_from(["SAME", "VALID", "SAME_LOWER", ""]))
    if not padding:
        padding = tuple(zip(each(-1, 3), each(-1, 3), strict=True))
        options["lhs_dilation"] = each(1, 2)
    return image, kernel, each(1, 3), padding, options


@settings(max_examples=25, deadline=None, derandomize=True)
@given(convolutions())
def test_value_and_gradients_equal_lax(drawn):
    image, kernel, strides, padding, options = drawn
    assert_equals_lax(digits(image), digits(kernel, seed=1), strides, padding, **options)


@pytest.mark.parametrize(
    ("image", "kernel", "strides", "padding"),
    [
        ((2, 8, 8, 3), (1, 1, 3, 4), (2, 2), "VALID"),  # the last row and column are never read
        ((2, 9, 8, 3), (2, 3, 3, 4), (4, 3), "VALID"),  # several rows and columns are never read
        ((2, 8, 8, 3), (3, 3, 3, 4), (2, 2), ((1, 1), (1, 1))),  # padding that is never read
        ((2, 6, 6, 2), (2, 2, 2, 3), (1, 1), ((4, 0), (0, 5))),  # padding wider than the kernel
        ((2, 6, 6, 2), (3, 3, 2, 3), (1, 2), ((-1, 0), (1, -2))),  # padding that crops
        ((2, 3, 3, 2), (4, 4, 2, 3), (1, 1), "VALID"),  # no output at all
        ((0, 6, 6, 2), (3, 3, 2, 3), (1, 1), "SAME"),  # no example
        ((2, 4, 4, MANY), (3, 3, MANY, MANY), (1, 1), "SAME"),  # three products
        ((2, 4, 4, MANY), (3, 3, MANY, MANY), (2, 2), "SAME"),  # an input gradient with strides
        ((1, SMALL_IMAGE + 1, 1, MANY), (3, 1, MANY, MANY), (1, 1), "SAME"),  # a large image
    ],
)
def test_corner_cases_equal_lax(image, kernel, strides, padding):
    assert_equals_lax(digits(image), digits(kernel, seed=1), strides, padding)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3, 1, 8), {}),  # depthwise, twice as many channels
        ((2, 3, 1, 4), {"window_strides": (2, 1), "rhs_dilation": (2, 1)}),
        ((3, 2, 1, 4), {"lhs_dilation": (1, 2), "window_strides": (2, 1)}),
    ],
)
def test_one_group_for_each_channel_equals_lax(kernel, options):
    options = {"strides": options.pop("window_strides", (1, 1)), **options}
    image, kernel = digits((2, 6, 7, 4)), digits(kernel, seed=1)
    assert_equals_lax(image, kernel, padding=((1, 2), (0, 1)), feature_group_count=4, **options)


def moved(shape, order, to):
    """The shape whose dimensions `order` names, in the order `to`."""
    return tuple(shape[order.index(name)] for name in to)


@pytest.mark.parametrize(
    "layout",
    [
        None,
        ("NCHW", "HWIO", "NHWC"),
        ("HWNC", "HOWI", "CNHW"),
        lax.ConvDimensionNumbers((0, 3, 1, 2), (2, 3, 0, 1), (1, 0, 2, 3)),
    ],
)
def test_layouts_equal_lax(layout):
    strings = layout if isinstance(layout, tuple) and isinstance(layout[0], str) else None
    image, kernel, _ = strings or ("NHWC" if layout else "NCHW", "HWOI" if layout else "OIHW", "")
    image = digits(moved((2, 5, 6, MANY), "NHWC", image))
    kernel = digits(moved((3, 2, MANY, 3), "HWIO", kernel), seed=1)
    assert_equals_lax(image, kernel, (1, 2), ((1, 1), (0, 1)), dimension_numbers=layout)


@pytest.mark.parametrize("channels", [3, MANY])
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
def test_dtypes_equal_lax(dtype, result_type, channels):
    with jax.enable_x64(True):
        image, kernel = digits((2, 6, 5, channels), dtype), digits((3, 2, channels, 4), dtype, 1)
        assert_equals_lax(image, kernel, (1, 1), "SAME", preferred_element_type=result_type)


def test_a_wider_result_is_summed_in_its_dtype():
    """float32 does not represent 2^24 + 1."""
    with jax.enable_x64(True):
        image, kernel = jnp.ones((1, 1, 1, MANY)), jnp.zeros((1, 1, MANY, 1))
        kernel = kernel.at[0, 0, :2, 0].set(jnp.array([2.0**24, 1])).astype(jnp.float32)
        types = {"dimension_numbers": LAYOUT, "preferred_element_type": jnp.float64}
        value = conv_general_dilated(image.astype(jnp.float32), kernel, (1, 1), "VALID", **types)
    assert value.item() == 2**24 + 1


@pytest.mark.parametrize("precision", ["highest", lax.Precision.HIGH, ("default", "highest")])
def test_precision_is_passed_on(precision):
    image, kernel = digits((2, 6, 5, 3)), digits((3, 2, 3, 4), seed=1)
    assert_equals_lax(image, kernel, (1, 1), "SAME", precision=precision)


def test_batch_groups_and_four_dimensions_equal_lax():
    options = {"batch_group_count": 2}
    assert_equals_lax(digits((4, 5, 5, 3)), digits((3, 3, 3, 4)), (1, 1), "SAME", **options)
    image, kernel = digits((1, 2, 3, 3, 2, 3)), digits((2, 2, 1, 2, 2, 1), seed=1)
    assert_equals_lax(image, kernel, (1,) * 4, "VALID", dimension_numbers=None)


@pytest.mark.parametrize(
    ("lhs", "rhs", "batch_groups", "sentence"),
    [
        (((2, 5, 3), jnp.float32), ((3, 3, 4), jnp.float32), 1, ""),
        (((2, 5, 3), jnp.int8), ((3, 3, 4), jnp.int8), 1, "int8 by int8"),
        (((2, 5, 3), jnp.bfloat16), ((3, 3, 4), jnp.float32), 1, "bfloat16 by float32"),
        (((2, 5, 3), jnp.complex64), ((3, 3, 4), jnp.complex64), 1, "complex64 by complex64"),
        (((2, 5, 3), jnp.float32), ((3, 3, 4), jnp.float32), 2, "batch groups"),
        (((2, 3), jnp.float32), ((3, 4), jnp.float32), 1, "0 spatial dimensions"),
        (((2, 1, 1, 1, 1, 3), jnp.float32), ((1,) * 6, jnp.float32), 1, "4 spatial dimensions"),
        (((2, 0, 3), jnp.float32), ((3, 3, 4), jnp.float32), 1, "an empty array"),
    ],
)
def test_reasons_why_a_convolution_is_left_to_lax(lhs, rhs, batch_groups, sentence):
    arrays = (jax.ShapeDtypeStruct(*array) for array in (lhs, rhs))
    assert why_slow(*arrays, batch_groups) == sentence


def test_errors_are_those_of_lax():
    image, kernel = digits((2, 6, 6, 3)), digits((3, 3, 4, 2))
    with pytest.raises((TypeError, ValueError), match="feature"):
        conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def test_without_jit_it_equals_lax():
    image, kernel = digits((2, 5, 5, 2)), digits((3, 3, 2, 3), seed=1)
    assert_equals_lax(image, kernel, (2, 2), "SAME", jit=lambda run: run)


def test_flax_layers_take_the_convolution():
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
