"""Comparisons of functions whose results must be equal to the last bit."""

import jax
import numpy as np
from plain_layers import digits


def assert_same(ours, theirs):
    """Equal trees, with equal dtypes."""

    def one(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))

    jax.tree.map(one, ours, theirs)


def value_and_gradients(fn, *operands):
    """fn(*operands), and the gradients of its operands for a cotangent of small whole numbers."""
    value, pullback = jax.vjp(fn, *operands)
    return value, pullback(digits(value.shape, value.dtype, 2))


def assert_equal_functions(ours, theirs, *operands, jit=jax.jit):
    """Equal values and gradients of two functions, computed in one program."""
    both = lambda *args: tuple(value_and_gradients(fn, *args) for fn in (ours, theirs))
    assert_same(*jit(both)(*operands))
