"""Weights and rates that are no numbers, or none that float32 holds."""

import re
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlocal import ConfigurationError, Layout


@pytest.mark.parametrize("field", ["weights", "rates"])
@pytest.mark.parametrize(
    "wrong", ["abc", ["1", "2"], None, [1, [2, 3]], 1j, {"a": 1}, [1, None], np.array(["x"])]
)
def test_what_is_not_a_number_is_refused_in_one_sentence(field, wrong):
    message = f"worker {field} must be real numbers, got {wrong!r}"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        Layout(1, 2, **{field: wrong})


def test_numbers_of_any_type_are_taken():
    for weights in (
        [Fraction(1, 4), Fraction(3, 4)],
        np.array([1, 3], np.uint8),
        jnp.array([0.25, 0.75], jnp.bfloat16),
    ):
        np.testing.assert_array_equal(Layout(1, 2, weights).weight, [[0.25, 0.75]])


def test_a_rate_that_float32_takes_for_zero_is_refused():
    with pytest.raises(ConfigurationError, match="a worker rate of 1e-50 is 0 in float32"):
        Layout(1, 2, rates=[1, 1e-50])


def test_a_number_of_hubs_is_no_truth_value():
    with pytest.raises(ConfigurationError, match="hubs must be an integer of at least 1, got True"):
        Layout(hubs=True)
