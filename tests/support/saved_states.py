"""States that are saved and restored, made by hand so that nothing is compiled, and their bits."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlocal.types import Memory, RoundMemory, TrainState


def as_numbers(tree):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    raw = lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x).copy()
    return jax.tree.map(raw, tree)


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, as_numbers(one), as_numbers(other))


def state_of(params, step=3):
    """A state of these parameters; nothing is compiled."""
    return TrainState(params, (), {}, (), RoundMemory(Memory(), Memory()), jax.random.key(0), step)


def shapes_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
