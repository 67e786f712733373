"""Layers that stay slow in a rewritten function are reported with the reason, and unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from plain_layers import IMAGES, KERNEL, LAYOUT, convolve, digits, loss

from jaxlocal.errors import ConfigurationError
from jaxlocal.nn import (
    conv_general_dilated,
    conv_relu_max_pool,
    fast_layers,
    fast_layers_report,
)


def custom_rule(loss):
    """A function with a custom derivative: twice that of its equations."""
    ruled = jax.custom_vjp(loss)
    twice = lambda saved, cotangent: jax.tree.map(
        lambda g: 2 * cotangent * g, jax.grad(loss, (0, 1))(*saved)
    )
    ruled.defvjp(lambda *args: (loss(*args), args), twice)
    return ruled


def custom_forward_rule(loss):
    ruled = jax.custom_jvp(loss)
    ruled.defjvp(lambda args, tangents: jax.jvp(loss, args, tangents))
    return ruled


def in_shard_map(loss):
    mesh = Mesh(np.array(jax.devices()[:1]), ("workers",), axis_types=(AxisType.Auto,))
    return jax.shard_map(loss, mesh=mesh, in_specs=(P(), P()), out_specs=P())


def grouped(kernel, images):
    return convolve(images, kernel, batch_group_count=2).sum()


def pooled(images, window, strides=None, padding="VALID"):
    return linen.max_pool(images, window, strides or window, padding)


def gradient_of_pooling(kernel, images):
    return jax.grad(lambda x: pooled(x, (2, 2)).sum())(images)


CONVOLUTION = "convolution [2, 4, 6, 3] by [3, 3, 3, 2]"
POOLING = "max pooling [2, 4, 6, 3] by"
LEFT = {
    "batch groups": (grouped, f"{CONVOLUTION}: batch groups"),
    "whole numbers": (
        lambda k, x: convolve(x.astype(int), k.astype(int)),
        f"{CONVOLUTION}: int32 by int32",
    ),
    "overlap": (
        lambda k, x: pooled(x, (3, 3), (2, 2)),
        f"{POOLING} [1, 3, 3, 1]: windows that overlap or leave gaps",
    ),
    "padding": (lambda k, x: pooled(x, (3, 3), padding="SAME"), f"{POOLING} [1, 3, 3, 1]: padding"),
    "large": (
        lambda k, x: pooled(x, (3, 6)),
        f"{POOLING} [1, 3, 6, 1]: a window of 18 entries",
    ),
    "custom_vjp": (custom_rule(grouped), f"{CONVOLUTION}: inside custom_vjp_call"),
    "custom_jvp": (custom_forward_rule(grouped), f"{CONVOLUTION}: inside custom_jvp_call"),
    "shard_map": (in_shard_map(grouped), f"{CONVOLUTION}: inside shard_map"),
}


@pytest.mark.parametrize(("fn", "line"), LEFT.values(), ids=LEFT)
def test_layers_that_stay_slow_are_reported(fn, line):
    """The warning has one line for two equal layers, and the program is the plain one."""
    twice = lambda kernel, images: (fn(kernel, images), jax.jit(fn)(kernel, images))
    assert fast_layers_report(twice, KERNEL, IMAGES) == ([], [line] * 2)
    with pytest.warns(UserWarning) as caught:
        program = jax.make_jaxpr(fast_layers(twice))(KERNEL, IMAGES)
    assert [str(w.message) for w in caught] == [f"fast_layers leaves slow: {line}"]
    assert str(program) == str(jax.make_jaxpr(twice)(KERNEL, IMAGES))


def test_other_layers_are_fast_and_custom_derivatives_are_kept():
    """A layer that stays slow keeps its derivative, and other layers are replaced."""

    def mixed(kernel, images):
        return loss(kernel, images) + custom_rule(grouped)(kernel, images)

    assert fast_layers_report(mixed, KERNEL, IMAGES).fast == [
        CONVOLUTION,
        "max pooling [2, 4, 6, 2] by [1, 2, 2, 1]",
    ]
    with pytest.warns(UserWarning, match="inside custom_vjp_call"):
        both = [jax.grad(fn, (0, 1)) for fn in (fast_layers(mixed), mixed)]
        ours, theirs = jax.jit(lambda *args: [fn(*args) for fn in both])(KERNEL, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_it_warns_once_for_a_trace_and_reports_of_shapes():
    traced = jax.jit(jax.grad(fast_layers(grouped)))
    with pytest.warns(UserWarning) as caught:
        traced(KERNEL, IMAGES)
        traced(KERNEL, IMAGES)
    assert len(caught) == 1
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (KERNEL, IMAGES)]
    assert fast_layers_report(grouped, *shapes).slow == [f"{CONVOLUTION}: batch groups"]


def test_layers_of_this_package_are_fast_already():
    def own(kernel, images):
        return conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT).sum()

    for fn in (own, jax.vmap(own, (None, 0))):
        images = IMAGES if fn is own else IMAGES[:, None]
        report = fast_layers_report(fn, KERNEL, images)
        assert len(report.fast) == 1 and not report.slow
    once, twice = (fast_layers_report(fn, KERNEL, IMAGES) for fn in (loss, fast_layers(loss)))
    assert len(once.fast) == 2 and twice == (
        [CONVOLUTION],
        [],
    )  # the pooling is no pooling any more


def test_a_gradient_of_an_own_chain_is_kept():
    """Its backward pass holds another function of this package with a derivative of its own."""
    images, kernel = digits((2, 6, 6, 1)), digits((3, 3, 1, 2), seed=1)
    chain = lambda kernel: conv_relu_max_pool(images, kernel, jnp.zeros(2)).sum()
    inner = lambda kernel: jax.grad(chain)(kernel).sum()
    assert fast_layers_report(inner, kernel).slow == []
    np.testing.assert_array_equal(fast_layers(inner)(kernel), inner(kernel))


def test_a_gradient_of_a_pooling_is_reported_as_slow():
    slow = fast_layers_report(gradient_of_pooling, KERNEL, IMAGES).slow
    line = "gradient of a max pooling [2, 2, 3, 3] by [1, 2, 2, 1]"
    assert slow == [f"{line}: fast_layers belongs around the loss"]


def test_a_module_as_an_argument_is_an_error():
    layer = nnx.Conv(3, 2, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigurationError, match="nnx.Module Conv would be lost: nnx.split"):
        fast_layers(lambda layer, images: layer(images))(layer, IMAGES)
