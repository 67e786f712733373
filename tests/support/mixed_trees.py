"""Trees of mixed leaves, and the payload that every compressor makes of one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import registry

from jaxlocal.compression import parse

SPARSE = ["grbs:8", "random_k:8", "random_k:2.5", "top_k:8", "top_k:8:tensor", "top_k:8:model"]
DENSE = ["sign", "two_bit", "qsgd:5", "int8", "bfloat16"]
CODED = [
    *("grbs:8+qsgd:4", "random_k:8+bfloat16", "top_k:8+int8", "top_k:8+two_bit"),
    "top_k:8:model+sign",
]
ONE_MESSAGE = ["identity", "zero", *SPARSE, *DENSE, *CODED, *registry.COMPRESSORS]
SPECS = [*ONE_MESSAGE, "powersgd:2"]
KEY = jax.random.key(7)


def mixed(seed: int = 0):
    """A scalar, a bias, a matrix, a kernel, a long vector, bfloat16, integers, an empty array."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "bias": normal(10),
        "count": jnp.arange(3, dtype=jnp.int32),
        "half": normal(33).astype(jnp.bfloat16),
        "kernel": normal(3, 3, 4, 8),
        "long": normal(5000),
        "matrix": normal(7, 5),
        "nothing": jnp.zeros((0, 4)),
        "scalar": normal(),
    }


def whole_payload(code, tree, memory, key, average=lambda payload: payload):
    """The payload of a tree as the decoder gets it, of both messages where there are two.

    `average` makes the workers' average of this worker's first payload.
    """
    payload = code.encode(tree, memory, key)
    if code.second is None:
        return payload
    known = code.second.settle(average(payload))
    return {**known, **code.second.encode(tree, known, key)}


@functools.cache
def encoder(spec):
    """(tree, key) -> payload, compiled."""
    code = parse(spec)
    return jax.jit(lambda tree, key: whole_payload(code, tree, code.init(tree), key))


@functools.cache
def decoder(spec):
    """(payload, key, onto, scale) -> onto + scale · C(x), compiled."""
    return jax.jit(parse(spec).decode)


def decoded(spec, payload, key, like):
    """C(x), as float32."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    return decoder(spec)(payload, key, zeros, 1.0)


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def differs(one, other) -> bool:
    """Whether any value of two trees differs."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)


def assert_close(one, other, rtol=1e-6, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        as_float64(one),
        as_float64(other),
    )


def tree_bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
