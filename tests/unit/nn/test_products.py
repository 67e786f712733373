"""The matrix products of a convolution and its gradients equal the convolution of JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exactly import assert_same
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from plain_layers import digits

from jaxlocal.nn import products
from jaxlocal.nn.products import Axis

LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def reference(axes, groups=1):
    """The same convolution by JAX, padded after the last input as far as the outputs read."""
    pads = []
    for axis in axes:
        read = axis.stride * (axis.out - 1) + 1 + axis.dilation * (axis.taps - 1)
        pads.append((axis.low, read - axis.low - axis.size))
    return partial(
        lax.conv_general_dilated,
        window_strides=[axis.stride for axis in axes],
        padding=pads,
        rhs_dilation=[axis.dilation for axis in axes],
        dimension_numbers=LAYOUTS[len(axes)],
        feature_group_count=groups,
    )


def operands(axes, batch, ins, outs, groups=1, dtype=jnp.float64):
    """Image, kernel and cotangent."""
    image = (batch, *(axis.size for axis in axes), groups * ins)
    kernel = (*(axis.taps for axis in axes), ins, groups * outs)
    cotangent = (batch, *(axis.out for axis in axes), groups * outs)
    return [digits(shape, dtype, seed) for seed, shape in enumerate((image, kernel, cotangent))]


# The number of outputs is arbitrary: some taps read only padding, and some inputs are never read.
axis = st.builds(
    Axis,
    size=st.integers(1, 6),
    out=st.integers(1, 4),
    taps=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    low=st.integers(-2, 3),
)
every_axes = st.lists(axis, min_size=1, max_size=3).map(tuple)
few = st.integers(1, 3)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(axes=every_axes, batch=few, ins=few, outs=few)
@example(axes=(Axis(2, 2, 3, low=1), Axis(3, 2, 3, stride=2, low=1)), batch=1, ins=3, outs=3)
@example(axes=(Axis(6, 6, 3, low=1), Axis(6, 6, 3, low=1)), batch=3, ins=2, outs=3)
def test_value_and_gradients_equal_lax(axes, batch, ins, outs):
    """In the first example the kernel is larger than the image, and is not transposed."""

    def both(image, kernel, cotangent):
        value, pullback = jax.vjp(reference(axes), image, kernel)
        ours = (
            products.forward(axes, image, kernel),
            products.input_gradient(axes, kernel, cotangent),
            products.weight_gradient(axes, image, cotangent),
        )
        return ours, (value, *pullback(cotangent))

    with jax.enable_x64(True):
        assert_same(*jax.jit(both)(*operands(axes, batch, ins, outs)))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(axes=every_axes, batch=few, ins=few, outs=few, groups=st.integers(2, 4))
def test_weight_gradient_of_groups_equals_lax(axes, batch, ins, outs, groups):
    def both(image, kernel, cotangent):
        theirs = jax.vjp(partial(reference(axes, groups), image), kernel)[1](cotangent)[0]
        return products.grouped_weight_gradient(axes, groups, image, cotangent), theirs

    with jax.enable_x64(True):
        assert_same(*jax.jit(both)(*operands(axes, batch, ins, outs, groups)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """4101 is odd and above 2^12, so neither half precision represents it."""
    axes = (Axis(1, 1, 3, low=1), Axis(1, 1, 1))
    image, kernel = jnp.ones((1, 1, 1, 4101), dtype), jnp.ones((3, 1, 4101, 1), dtype)
    value = products.forward(axes, image, kernel)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, [[[[4101]]]])
    cotangent = jnp.ones((4101, 1, 1, 1), dtype)
    gradient = products.weight_gradient(axes, jnp.ones((4101, 1, 1, 1), dtype), cotangent)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient.ravel(), [0, 4101, 0])
