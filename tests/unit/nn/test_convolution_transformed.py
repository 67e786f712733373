"""The convolution equals that of JAX in all transformations: loops, maps and second gradients."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exactly import assert_same, value_and_gradients
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from plain_layers import LAYOUT, digits

from jaxlocal.nn import conv_general_dilated
from jaxlocal.nn.forms import FEW_CHANNELS as MANY

STACKED, COMMON = P("hubs", "workers"), P()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_reverse_mode_twice(dtype):
    """With the forms of float32, convolutions, and those of float64, products."""

    def second(convolve):
        convolve = partial(
            convolve, window_strides=(2, 1), padding="SAME", dimension_numbers=LAYOUT
        )

        def loss(image, kernel):
            return (convolve(image, kernel) ** 3).sum()

        def sum_of_gradients(image, kernel):
            return sum(g.sum() for g in jax.grad(loss, (0, 1))(image, kernel))

        return jax.jit(jax.grad(sum_of_gradients, (0, 1)))(image, kernel)

    with jax.enable_x64(True):
        image, kernel = digits((1, 4, 4, 2), dtype), digits((3, 3, 2, 2), dtype, seed=1)
        assert_same(second(conv_general_dilated), second(lax.conv_general_dilated))


@pytest.mark.parametrize("ins", [2, MANY])
@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
def test_vmap(axes, ins):
    images, kernels = digits((3, 2, 5, 6, ins)), digits((3, 3, 2, ins, 4), seed=1)
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

        def step(kernel, image):
            _, (_, by_kernel) = one((image, kernel))
            return kernel - by_kernel, ()

        mapped = jax.jit(partial(lax.map, one))((images, kernels))
        return mapped, jax.jit(partial(lax.scan, step))(kernels[0], images)[0]

    assert_same(run(conv_general_dilated), run(lax.conv_general_dilated))


@pytest.mark.parametrize(
    ("image_spec", "kernel_spec", "ins"),
    [
        (STACKED, STACKED, 2),
        (STACKED, COMMON, 2),
        (STACKED, COMMON, MANY),
        (COMMON, STACKED, 2),
        (COMMON, COMMON, 2),
        (P("hubs"), P(None, "workers"), 2),
    ],
)
def test_shard_map(image_spec, kernel_spec, ins):
    """The gradient of a common operand is common, summed over the devices, as in lax."""
    devices = np.array(jax.devices())[:, None]
    mesh = Mesh(devices, ("hubs", "workers"), axis_types=(AxisType.Auto,) * 2)
    images, kernels = (
        digits((len(devices), 1, 2, 5, 6, ins)),
        digits((len(devices), 1, 3, 2, ins, 4), seed=1),
    )

    def run(convolve):
        def per_device(images, kernels):
            def loss(image, kernel):
                return (
                    convolve(image, kernel, (2, 1), "SAME", dimension_numbers=LAYOUT) ** 2
                ).sum()

            def step(carry, _):
                by_image, by_kernel = jax.grad(loss, (0, 1))(images[0, 0], carry)
                return carry - by_kernel, by_image[None, None]

            kernel, by_images = lax.scan(step, kernels[0, 0], None, length=2)
            return kernel[None, None], by_images[0]

        specs = (image_spec, kernel_spec)
        mapped = jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=specs[::-1])
        return jax.jit(mapped)(images, kernels)

    assert_same(run(conv_general_dilated), run(lax.conv_general_dilated))


@pytest.mark.optimized
@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="only XLA:CPU needs canonical convolutions"
)
def test_gradients_in_a_loop_compile_to_canonical_convolutions():
    """XLA:CPU has a fast kernel for `b01f_01io->b01f` only, which lax's weight gradient is not."""
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
