"""PowerSGD: its projection, its warm start and its payload."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlocal.compression import payload_bits, powersgd
from jaxlocal.errors import ConfigurationError

KEY = jax.random.key(0)


def message(code, trees, memory, key=KEY):
    """One exchange between workers of equal weight: the decoded average and the new memory."""
    mean = lambda trees: jax.tree.map(lambda *x: sum(x) / len(x), *trees)
    known = code.second.settle(mean([code.encode(tree, memory, None) for tree in trees]))
    second = [code.second.encode(tree, known, None) for tree in trees]
    payload = {**known, **mean(second)}
    zeros = jax.tree.map(jnp.zeros_like, trees[0])
    return code.decode(payload, None, zeros, 1.0), code.second.remember(memory, payload, key)


def matrix(rows, columns, singular_values, seed=0):
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(rows, len(singular_values))))[0]
    right = np.linalg.qr(rng.normal(size=(columns, len(singular_values))))[0]
    return jnp.asarray((left * singular_values) @ right.T, jnp.float32)


def best(x, rank):
    """The best approximation of a matrix of this rank."""
    left, values, right = np.linalg.svd(np.float64(x), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def test_a_message_is_the_projection_of_the_average_onto_its_sketch():
    code = powersgd(3)
    trees = [
        {"w": matrix(30, 20, np.ones(20), seed), "b": jnp.full(4, float(seed))} for seed in range(2)
    ]
    memory = code.init(trees[0])
    (start,) = memory[0].values
    mean = np.mean([np.float64(tree["w"]) for tree in trees], axis=0)
    basis = np.linalg.qr(mean @ np.float64(start))[0]
    average, after = message(code, trees, memory)
    np.testing.assert_allclose(average["w"], basis @ basis.T @ mean, atol=1e-6)
    np.testing.assert_array_equal(average["b"], np.full(4, 0.5))
    # Q is Mᵀ times an orthonormal basis of the same space.
    right = np.float64(after[0].values[0])
    np.testing.assert_allclose(right @ right.T, mean.T @ basis @ basis.T @ mean, atol=1e-6)


def test_the_warm_start_reaches_the_best_approximation():
    code, values = powersgd(2), 2.0 ** -np.arange(8)
    x = {"w": matrix(20, 12, values)}
    memory = code.init(x)
    for _ in range(15):  # every message multiplies the error by (1/2)²
        sent, memory = message(code, [x], memory)
    np.testing.assert_allclose(sent["w"], best(x["w"], 2), atol=1e-5)


def test_kernels_are_matrices_of_their_last_dimension():
    code, x = powersgd(1), matrix(36, 8, [3.0])
    sent, _ = message(code, [x.reshape(3, 3, 4, 8)], code.init(x.reshape(3, 3, 4, 8)))
    np.testing.assert_allclose(sent.reshape(36, 8), x, atol=1e-6)


@pytest.mark.parametrize("zero_rows", [0, 6])
def test_it_recovers_from_a_message_of_zeros(zero_rows):
    code = powersgd(2)
    x = {"w": matrix(20, 12, 2.0 ** -np.arange(8)).at[:zero_rows].set(0)}
    memory = code.init(x)
    sent, memory = message(code, [jax.tree.map(jnp.zeros_like, x)], memory)
    assert not np.asarray(sent["w"]).any()
    for _ in range(20):
        sent, memory = message(code, [x], memory)
    np.testing.assert_allclose(sent["w"], best(x["w"], 2), atol=1e-5)


def test_it_recovers_from_a_matrix_of_lower_rank():
    code, x = powersgd(2), matrix(20, 12, 2.0 ** -np.arange(8))
    memory = code.init(x)
    sent, memory = message(code, [best(x, 1).astype(np.float32)], memory)
    np.testing.assert_allclose(sent, best(x, 1), atol=1e-6)
    for _ in range(20):
        sent, memory = message(code, [x], memory)
    np.testing.assert_allclose(sent, best(x, 2), atol=1e-5)


@pytest.mark.parametrize("values", [np.ones(10), 0.5 ** np.arange(10), np.eye(10)[0]])
def test_the_contraction_of_a_first_message(values):
    """Random rotations of the matrix stand for random starts, since a Gaussian Q is invariant under
    rotations."""
    code, count = powersgd(2), 200
    xs = jnp.stack([matrix(14, 10, values, seed) for seed in range(count)])
    memory = code.init(xs[0])

    @jax.jit
    @jax.vmap
    def residual(x):
        known = code.second.settle(code.encode(x, memory, None))
        payload = {**known, **code.second.encode(x, known, None)}
        return code.decode(payload, None, x, -1.0)

    shares = (np.float64(residual(xs)) ** 2).sum((1, 2)) / (values**2).sum()
    margin = 4 * shares.std() / np.sqrt(count) + 1e-6
    assert code.delta(xs[0]) == 2 / 10
    assert shares.mean() <= 1 - 2 / 10 + margin
    if (values == 1).all():  # no direction is larger than another, and the bound is reached
        assert shares.mean() >= 1 - 2 / 10 - margin


def test_tensors_that_would_not_be_smaller_are_sent_uncompressed():
    code = powersgd(2)
    # 2 · (4 + 4) factors are as many values as the 4 · 4 of the matrix.
    assert payload_bits(code, [jnp.zeros((4, 4)), jnp.zeros((9, 9))]) == 32 * (16 + 36)
    # Factors of bfloat16 are float32: 2 · (9 + 9) · 32 bits against 81 · 16, and 2 · 40 · 32
    # against 400 · 16.
    halves = [jnp.zeros((9, 9), jnp.bfloat16), jnp.zeros((20, 20), jnp.bfloat16)]
    assert payload_bits(code, halves) == 36 * 32 + 80 * 32
    assert code.delta([jnp.zeros((4, 4)), jnp.zeros(5)]) == 1.0


def test_a_direction_that_was_zero_in_the_first_messages_is_found_later():
    """The first gradients have one direction, orthogonal to that of the later ones."""
    code = powersgd(1)
    first, later = (jnp.zeros((8, 8)).at[i, i].set(1.0) for i in (0, 7))
    memory = code.init(first)
    for number in range(3):
        _, memory = message(code, [first], memory, jax.random.key(number))
    found = []
    for number in range(4):
        sent, memory = message(code, [later], memory, jax.random.key(10 + number))
        found.append(float(jnp.vdot(sent, later)))
    np.testing.assert_allclose(found[-1], 1.0, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, 1.5, "2", True])
def test_a_rank_below_1_is_an_error(rank):
    with pytest.raises(ConfigurationError) as error:
        powersgd(rank)
    assert str(error.value) == f"the rank of powersgd must be an integer ≥ 1, got {rank!r}"


def test_a_rank_above_every_matrix_is_an_error():
    tree = {"w": jnp.zeros((30, 7)), "b": jnp.zeros(99)}
    with pytest.raises(ConfigurationError) as error:
        powersgd(8).init(tree)
    expected = "powersgd:8 needs a matrix of at least 8 rows and columns, but the largest has 7"
    assert str(error.value) == expected
    with pytest.raises(
        ConfigurationError, match="the largest, 30 × 7, have 222 values for its 210"
    ):
        powersgd(6).init(tree)
    with pytest.raises(ConfigurationError, match="1 rows and columns, but the tree has no matrix"):
        powersgd(1).init({"b": jnp.zeros(99)})
