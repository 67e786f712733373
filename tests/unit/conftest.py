"""The unit tests run in JAX's strict modes, so that users' programs may.

No array is broadcast against one of another rank, and no two types are mixed, without a word.
"""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def strict():
    """Set both modes for the tests of a file and for its fixtures."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield
