"""‖x − C(x)‖² ≤ (1 − δ) ‖x‖², with the δ that a compressor states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry
from mixed_trees import CODED, DENSE, KEY, SPARSE, SPECS, mixed

from jaxlocal.compression import parse

VECTORS = {
    "one_hot": lambda n, rng: np.eye(n)[0],
    "last_hot": lambda n, rng: np.eye(n)[-1],
    "constant": lambda n, rng: np.ones(n),
    "two_scales": lambda n, rng: np.where(np.arange(n) % 9, 1e-3, 1e3),
    "tiny": lambda n, rng: 1e-30 * rng.normal(size=n),
    "normal": lambda n, rng: rng.normal(size=n),
    "heavy": lambda n, rng: rng.standard_cauchy(size=n),
}


SHORT = [
    *registry.COMPRESSORS,
    *SPARSE,
    *CODED,
    "grbs:5.5",
    "top_k:3+qsgd:3",
    "identity",
    "zero",
    "sign",
    "two_bit",
]


@pytest.mark.parametrize(
    "spec, n", [*((s, 37) for s in SHORT), *((s, 1100) for s in [*DENSE, "qsgd:2", "top_k:8"])]
)
def test_the_contraction_is_at_least_delta(spec, n):
    code = parse(spec)
    delta = code.delta(jnp.zeros(n))
    assert 0 <= delta <= 1
    rng = np.random.default_rng(0)
    xs = np.stack([make(n, rng) for make in VECTORS.values()]).astype(np.float32)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    @functools.partial(jax.vmap, in_axes=(0, None))
    def residual(x, key):
        return code.decode(code.encode(x, (), key), key, x, -1.0)

    keys = jax.random.split(KEY, 400)
    # Norms in float64: in float32 the squares of tiny values are zero.
    squares = np.float64(residual(xs, keys)) ** 2
    shares = squares.sum(-1) / (np.float64(xs) ** 2).sum(-1)  # [keys, vectors]
    # Four standard errors, and the rounding of values and scales.
    margin = 4 * shares.std(axis=0) / np.sqrt(len(keys)) + 1e-6
    assert (shares.mean(axis=0) <= 1 - delta + margin).all(), dict(
        zip(VECTORS, shares.mean(axis=0), strict=True)
    )


@pytest.mark.parametrize("spec", SPECS)
def test_the_delta_of_a_tree_is_that_of_its_worst_tensor(spec):
    code, tree = parse(spec), mixed()
    if "model" in spec or spec == "zero":
        return
    leaves = [x for x in tree.values() if not spec.startswith("powersgd") or x.ndim > 1]
    leaves = [x for x in leaves if x.size]
    assert code.delta(tree) == min(code.delta([x]) for x in leaves)
