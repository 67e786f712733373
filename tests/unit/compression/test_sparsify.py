"""Sparsifiers against slow loops, and how often they keep each value."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import jaxprs

from jaxlocal.compression import grbs, random_k, top_k
from jaxlocal.errors import ConfigurationError

KEY = jax.random.key(3)


def words(key, count):
    return np.asarray(jax.random.bits(key, (count,), jnp.uint32)).tolist()


def grbs_mask(n: int, ratio: float, word: int) -> np.ndarray:
    k = math.ceil(n / ratio)
    blocks = math.ceil(n / k)
    start = min((word % blocks) * k, n - k)
    return np.array([start <= i < start + k for i in range(n)])


def random_k_mask(n: int, ratio: float, drawn: list[int]) -> np.ndarray:
    """The mask of random_k, whose first n mod k runs have one value more."""
    k = math.ceil(n / ratio)
    mask, start = np.zeros(n, bool), 0
    for run in range(k):
        length = n // k + (run < n % k)
        mask[start + drawn[run] % length] = True
        start += length
    assert start == n
    return mask


def top_k_mask(x: np.ndarray, ratio: float, length: int) -> np.ndarray:
    mask = np.zeros(len(x), bool)
    for start in range(0, len(x), length):
        inside = sorted(range(start, min(start + length, len(x))), key=lambda i: (-abs(x[i]), i))
        mask[inside[: math.ceil(length / ratio)]] = True
    return mask


def normal(n, seed=0):
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def decoded(code, tree, key=KEY):
    payload = code.encode(tree, (), key)
    return code.decode(payload, key, jax.tree.map(jnp.zeros_like, tree), 1.0)


@pytest.mark.parametrize("ratio", [1.5, 8, 100])
def test_grbs_equals_its_loop(ratio):
    xs = [normal(5), normal(64), normal(301)]
    drawn = words(KEY, 3)  # one word for each tensor, of one call
    for x, sent, word in zip(xs, decoded(grbs(ratio), xs), drawn, strict=True):
        mask = grbs_mask(len(x), ratio, word)
        np.testing.assert_array_equal(sent, np.where(mask, x, 0))


@pytest.mark.parametrize("ratio", [1.5, 8, 100])
def test_random_k_equals_its_loop(ratio):
    xs = [normal(5), normal(64), normal(301)]
    drawn = words(KEY, sum(math.ceil(len(x) / ratio) for x in xs))
    for x, sent in zip(xs, decoded(random_k(ratio), xs), strict=True):
        mask = random_k_mask(len(x), ratio, drawn)
        drawn = drawn[mask.sum() :]
        np.testing.assert_array_equal(sent, np.where(mask, x, 0))


@pytest.mark.parametrize("ratio", [1.5, 8, 100])
def test_top_k_equals_its_loop(ratio):
    xs = [normal(5), normal(301), normal(9001)]  # 9001 values are chunks of 3001, 3001 and 2999
    for x, sent in zip(xs, decoded(top_k(ratio), xs), strict=True):
        mask = top_k_mask(x, ratio, min(len(x), 3001))
        uncompressed = (40 if len(x) <= 256 else 48) * mask.sum() >= 32 * len(x)
        np.testing.assert_array_equal(sent, np.where(mask | uncompressed, x, 0))
    for x, sent in zip(xs, decoded(top_k(ratio, "tensor"), xs), strict=True):
        mask = top_k_mask(x, ratio, len(x))
        uncompressed = (40 if len(x) <= 256 else 48) * mask.sum() >= 32 * len(x)
        np.testing.assert_array_equal(sent, np.where(mask | uncompressed, x, 0))
    whole = np.concatenate(xs)
    sent = np.concatenate(decoded(top_k(ratio, "model"), xs))
    uncompressed = 48 * math.ceil(len(whole) / ratio) >= 32 * len(whole)
    mask = top_k_mask(whole, ratio, len(whole)) | uncompressed
    np.testing.assert_array_equal(sent, np.where(mask, whole, 0))


def test_top_k_keeps_the_first_of_equals_and_no_padding():
    sent = decoded(top_k(4096), jnp.ones(4097))  # chunks of 2049 and 2048
    assert np.flatnonzero(sent).tolist() == [0, 2049]


def test_top_k_of_a_model_of_several_dtypes():
    tree = {"a": jnp.array([1.0, 5.0, 2.0] * 5), "b": jnp.full(9, 4.0, jnp.bfloat16)}
    sent = decoded(top_k(3, "model"), {**tree, "c": jnp.arange(2)})
    assert sent["b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(sent["a"], np.where(tree["a"] == 5, tree["a"], 0))
    np.testing.assert_array_equal(np.float32(sent["b"]), [4.0] * 3 + [0.0] * 6)


def frequency(code, n, keys=4000):
    """How often each of n values is kept."""
    x = jnp.ones(n)
    once = lambda key: code.decode(code.encode(x, (), key), key, jnp.zeros(n), 1.0)
    return np.asarray(jax.jit(jax.vmap(once))(jax.random.split(KEY, keys))).mean(0)


@pytest.mark.parametrize("code, n", [(grbs(4), 26), (grbs(3.3), 26), (grbs(99), 26)])
def test_grbs_keeps_every_value_as_often_as_blocks_cover_it(code, n):
    k = math.ceil(n / code.ratio)
    starts = [min(b * k, n - k) for b in range(math.ceil(n / k))]
    expected = np.mean([[s <= i < s + k for i in range(n)] for s in starts], axis=0)
    # Five standard errors of a share of 4000 draws.
    np.testing.assert_allclose(frequency(code, n), expected, atol=5 * np.sqrt(0.25 / 4000))
    assert code.delta(jnp.zeros(n)) == pytest.approx(expected.min())


@pytest.mark.parametrize("code, n", [(random_k(4), 26), (random_k(3.3), 26), (random_k(99), 26)])
def test_random_k_keeps_one_of_each_run(code, n):
    k = math.ceil(n / code.ratio)
    lengths = [n // k + (run < n % k) for run in range(k)]
    expected = np.concatenate([[1 / length] * length for length in lengths])
    np.testing.assert_allclose(frequency(code, n), expected, atol=5 * np.sqrt(0.25 / 4000))
    assert code.delta(jnp.zeros(n)) == pytest.approx(expected.min())
    assert np.count_nonzero(decoded(code, jnp.ones(n))) == k


def test_every_tensor_draws_its_own_block():
    sent = decoded(grbs(16), [jnp.ones(160)] * 8)
    assert len({int(np.flatnonzero(x)[0]) for x in sent}) > 1


def test_grbs_touches_only_the_block():
    """Only slices take the whole tensor, and nothing is sorted."""
    code, x = grbs(64), jnp.zeros(64 * 1024)
    for fn in (
        lambda x: code.encode(x, (), KEY),
        lambda x: code.decode(code.encode(x, (), KEY), KEY, x, -1.0),
    ):
        large = {
            eqn.primitive.name
            for jaxpr in jaxprs(jax.make_jaxpr(fn)(x))
            for eqn in jaxpr.eqns
            if any(v.aval.size >= x.size for v in [*eqn.invars, *eqn.outvars])
        }
        calls = {"jit", "pjit", "custom_vmap_call"}  # whose equations are among those above
        assert large - calls <= {"reshape", "dynamic_slice", "dynamic_update_slice"}
        assert "dynamic_slice" in large


@pytest.mark.parametrize("make", [grbs, random_k, top_k])
@pytest.mark.parametrize("ratio", [0.5, 0, -3, math.inf, math.nan, "8", True])
def test_a_ratio_below_1_is_an_error(make, ratio):
    name = make.__name__
    with pytest.raises(ConfigurationError) as error:
        make(ratio)
    expected = f"the ratio of {name} must be a finite number of at least 1, got {ratio!r}"
    assert str(error.value) == expected


@pytest.mark.parametrize("make", [grbs, random_k, top_k])
def test_a_ratio_above_every_tensor_is_an_error(make):
    tree = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4), "steps": jnp.zeros(99, jnp.int32)}
    name = make.__name__
    with pytest.raises(ConfigurationError) as error:
        make(13).init(tree)
    expected = f"{name}:13 keeps one value in 13, but the largest tensor has 12"
    assert str(error.value) == expected
    assert make(12).init(tree) == ()


def test_granularity_model_needs_as_many_values_in_the_model():
    tree = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}
    assert top_k(16, "model").init(tree) == ()
    with pytest.raises(ConfigurationError) as error:
        top_k(17, "model").init(tree)
    assert str(error.value) == "top_k:17:model keeps one value in 17, but the model has 16"


def test_an_unknown_granularity_or_coder_is_an_error():
    with pytest.raises(ConfigurationError, match="unknown granularity of top_k 'tensors'; did you"):
        top_k(8, "tensors")
    with pytest.raises(ConfigurationError, match="unknown value coder 'int4'; did you mean 'int8'"):
        grbs(8, values="int4")
