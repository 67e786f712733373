"""Convolution, relu and pooling as one layer equal the three layers in value and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exactly import assert_equal_functions, assert_same, value_and_gradients
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from plain_layers import LAYOUT, digits

from jaxlocal.nn import conv_relu_max_pool
from jaxlocal.nn.pooled import MOST_IN, MOST_OUT, pays


def three_layers(images, kernel, bias):
    convolved = lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
    return nnx.max_pool(nnx.relu(convolved + bias[None, None, None]), (2, 2), (2, 2))


def operands(batch, sides, taps, ins, outs, dtype=jnp.float32):
    """Few different values, so that most windows hold their maximum more than once."""
    shapes = (batch, *sides, ins), (*taps, ins, outs), (outs,)
    return [jnp.sign(digits(shape, dtype, seed)) for seed, shape in enumerate(shapes)]


assert_equal = partial(assert_equal_functions, conv_relu_max_pool, three_layers)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    sides=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    taps=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    ins=st.integers(1, 3),
    outs=st.integers(1, 3),
)
def test_equals_three_layers(batch, sides, taps, ins, outs):
    assert_equal(*operands(batch, sides, taps, ins, outs))


@pytest.mark.parametrize("taps", [2, 3, 5, 7])
def test_square_kernels(taps):
    """On images that are larger and smaller than the kernel, with even and odd sides."""
    assert_equal(*operands(2, (4, 9), (taps, taps), 2, 3))


@pytest.mark.parametrize(
    ("sides", "ins", "outs"), [((4, 6), MOST_IN + 1, 2), ((4, 6), 1, MOST_OUT + 1), ((1, 4), 1, 2)]
)
def test_where_one_product_does_not_pay_it_runs_as_three_layers(sides, ins, outs):
    assert not pays(sides, ins, outs)
    assert_equal(*operands(2, sides, (3, 3), ins, outs))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_dtypes(dtype):
    with jax.enable_x64(True):
        assert_equal(*operands(2, (5, 4), (3, 3), 2, 3, dtype))


def test_without_jit():
    assert_equal(*operands(1, (4, 4), (3, 3), 1, 2), jit=lambda run: run)


def test_ties_send_the_gradient_to_the_first_maximum():
    image = jnp.array([[1.0, 3.0, 2.0, 2.0], [3.0, 3.0, 2.0, 2.0]]).reshape(1, 2, 4, 1)
    value = lambda image: conv_relu_max_pool(image, jnp.ones((1, 1, 1, 1)), jnp.zeros(1)).sum()
    expected = [[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    np.testing.assert_array_equal(jax.jit(jax.grad(value))(image)[0, :, :, 0], expected)


def test_where_relu_is_zero_there_is_no_gradient():
    image, kernel = jnp.ones((1, 4, 4, 1)), jnp.zeros((3, 3, 1, 1))
    gradients = jax.jit(jax.grad(lambda *args: conv_relu_max_pool(*args).sum(), (0, 1, 2)))
    for bias in (0.0, -1.0):
        for gradient in gradients(image, kernel, jnp.full(1, bias)):
            assert not gradient.any()


def test_reverse_mode_twice():
    def second(layers):
        loss = lambda *args: (layers(*args) ** 3).sum()
        squares = lambda *args: sum((g**2).sum() for g in jax.grad(loss, (0, 1, 2))(*args))
        return jax.jit(jax.grad(squares, (0, 1, 2)))(
            *operands(1, (4, 5), (3, 3), 1, 2, jnp.float64)
        )

    with jax.enable_x64(True):
        assert_same(second(conv_relu_max_pool), second(three_layers))


def test_forward_mode_is_an_error_of_jax():
    args = operands(1, (4, 4), (3, 3), 1, 1)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(conv_relu_max_pool, args, args)


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, 0, 0)])
def test_vmap(axes):
    images, kernel, bias = operands(6, (4, 5), (3, 3), 1, 2)
    stacked = images.reshape(3, 2, 4, 5, 1), jnp.stack([kernel] * 3), jnp.stack([bias] * 3)
    args = [x if axis == 0 else x[0] for x, axis in zip(stacked, axes, strict=True)]
    run = lambda layers: jax.vmap(partial(value_and_gradients, layers), in_axes=axes)(*args)
    assert_same(*jax.jit(lambda: (run(conv_relu_max_pool), run(three_layers)))())


@pytest.mark.parametrize("spec", [P("workers"), P()])
def test_in_a_loop_on_devices(spec):
    """The gradient of a common kernel is the sum over the devices."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("workers",), axis_types=(AxisType.Auto,))
    images, kernel, bias = operands(4, (4, 5), (3, 3), 1, 2)
    params = jnp.stack([kernel] * 2), jnp.stack([bias] * 2)

    def run(layers):
        def per_device(images, kernel, bias):
            def step(params, _):
                loss = lambda params: (layers(images, *params) ** 2).sum()
                grads = jax.grad(loss)(params)
                return jax.tree.map(lambda x, g: x - g, params, grads), ()

            params = lax.scan(step, (kernel[0], bias[0]), None, length=2)[0]
            return jax.tree.map(lambda x: x[None], params)

        specs = {"in_specs": (P("workers"), spec, spec), "out_specs": (spec, spec)}
        return jax.jit(jax.shard_map(per_device, mesh=mesh, **specs))(images, *params)

    assert_same(run(conv_relu_max_pool), run(three_layers))


def test_without_examples_there_is_no_output():
    images, kernel, bias = operands(2, (4, 6), (3, 3), 1, 2)
    assert_equal(images[:0], kernel, bias)


def test_shapes_that_do_not_fit_are_errors_of_jax():
    images, kernel, bias = operands(2, (4, 6), (3, 3), 1, 2)
    with pytest.raises(ValueError, match="feature"):
        conv_relu_max_pool(jnp.ones((2, 4, 6, 3)), kernel, bias)
    with jax.numpy_rank_promotion("raise"):
        jax.jit(jax.grad(lambda kernel: conv_relu_max_pool(images, kernel, bias).sum()))(kernel)
