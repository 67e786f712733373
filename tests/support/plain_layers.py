"""A small model of plain layers, which the tests of `fast_layers` replace by fast ones."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax import lax
from jax.extend import core

from jaxlocal.nn import fast_layers, fast_layers_report

# Names of the nested programs of the fast layers.
FAST = ("conv_general_dilated", "_max_pooling", "_conv_relu_max_pool")
LAYOUT = ("NHWC", "HWIO", "NHWC")


def digits(shape, dtype=jnp.float32, seed=0):
    """Small whole numbers, whose sums of products are exact in every order of summation."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), dtype)


IMAGES, KERNEL = digits((2, 4, 6, 3)), digits((3, 3, 3, 2), seed=1)


def moved(shape, layout, first):
    """The shape whose dimensions `first` names, in the order of a layout."""
    return tuple(shape[first.index(letter)] for letter in layout)


def convolve(images, kernel, layout=LAYOUT, strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=layout, **options
    )


def layers(kernel, images):
    """A plain convolution and a pooling; with a relu between them, they would be one chain."""
    hidden = convolve(images, kernel)
    return linen.max_pool(jnp.abs(hidden), (2, 2), (2, 2))


def loss(kernel, images):
    return (layers(kernel, images) ** 2).sum()


def assert_same(ours, theirs):
    def one(a, b):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))

    jax.tree.map(one, ours, theirs)


def plain_equations(jaxpr):
    """Primitives of plain layers and of their gradients in a program, outside of fast layers."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith(("conv_general", "reduce_window_max", "select_and_")):
            yield eqn.primitive.name
        elif eqn.params.get("name") not in FAST:
            for inner in core.jaxprs_in_params(eqn.params):
                yield from plain_equations(inner)


def left_plain(fn, *args):
    program = jax.make_jaxpr(fn)(*args)
    core.check_jaxpr(program.jaxpr)
    return set(plain_equations(program))


def assert_fast(plain, *args, argnums=(0, 1), layers=2):
    """The rewritten function has fast layers only, and the value and gradients of the plain one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast, slow = (jax.value_and_grad(fn, argnums) for fn in (fast_layers(plain), plain))
        assert_same(*jax.jit(lambda *args: (fast(*args), slow(*args)))(*args))
        assert not left_plain(fast, *args)
        assert len(fast_layers_report(plain, *args).fast) >= layers
    assert left_plain(slow, *args)
