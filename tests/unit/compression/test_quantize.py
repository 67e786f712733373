"""Quantisers against slow loops, their packing, their bias and what they lose."""

import itertools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlocal.compression import bfloat16, grbs, int8, parse, qsgd, sign, top_k, two_bit
from jaxlocal.compression.arrays import pack, unpack
from jaxlocal.errors import ConfigurationError

KEY = jax.random.key(5)
X = np.random.default_rng(0).normal(size=1500).astype(np.float32)


def decoded(code, x, key=KEY):
    return np.asarray(code.decode(code.encode(x, (), key), key, jnp.zeros_like(x), 1.0))


def test_sign_equals_its_loop():
    scale = sum(abs(float(v)) for v in X) / len(X)
    # The mean of 1500 float32 magnitudes.
    np.testing.assert_allclose(decoded(sign(), X), [scale if v >= 0 else -scale for v in X], 1e-6)
    payload = sign().encode(X, (), KEY)[0].values
    byte = sum(int(v < 0) << (7 - i) for i, v in enumerate(X[:8]))
    assert int(payload["negative"][0, 0]) == byte and payload["negative"].shape == (1, 188)


def two_bit_loop(x):
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - 1))
    bins = [min(max(round((v - mean) / (1.5 * deviation) + 2), 0), 3) for v in x]
    inside = [[v for v, b in zip(x, bins, strict=True) if b == number] for number in range(4)]
    assert all(inside)
    return [sum(inside[b]) / len(inside[b]) for b in bins]


@pytest.mark.parametrize("shift", [0, 2])
def test_two_bit_equals_its_loop(shift):
    x = X + np.float32(shift)
    # No value is so near to the border of a bin that float32 could move it over.
    np.testing.assert_allclose(decoded(two_bit(), x), two_bit_loop(np.float64(x).tolist()), 1e-6)
    payload = two_bit().encode(x, (), KEY)[0].values
    shapes = {name: leaf.shape for name, leaf in payload.items()}
    assert shapes == {"bins": (1, 375), "levels": (1, 4)}


@pytest.mark.parametrize("ratio", [25, 50, 100])
def test_two_bit_sends_up_to_four_values_exactly(ratio):
    x = X[:100]
    np.testing.assert_array_equal(
        decoded(top_k(ratio, values="two_bit"), x), decoded(top_k(ratio), x)
    )


def test_the_delta_of_two_bit_is_nearly_reached():
    """By the case of its proof: one large value and m at +3/4 of the deviation share a bin, and the
    others, at ±3/4, one around the mean."""
    n, m, outside, within = 10_001, 88, 0.7501, 0.7499
    inside = n - 1 - m
    large = math.sqrt(n - 1 - m * outside**2 - inside * within**2)
    positive = round((inside - (large + m * outside) / within) / 2)
    signs = np.where(np.arange(inside) < positive, 1, -1)
    x = np.concatenate([[large], np.full(m, outside), within * signs]).astype(np.float32)
    kept = (np.float64(decoded(two_bit(), x)) ** 2).sum() / (np.float64(x) ** 2).sum()
    delta = two_bit().delta(x)
    assert delta == pytest.approx(3 * (math.sqrt(7 / 16 * (n - 1)) - 0.75) / (n - 1))
    assert delta <= kept <= 1.05 * delta


def lost(sent, x):
    return ((np.float64(x) - sent) ** 2).sum() / (np.float64(x) ** 2).sum()


@pytest.mark.parametrize(
    "values, expected", [("sign", 0.0125), ("two_bit", 0.0125), ("qsgd:2", 0.875)]
)
def test_what_coders_lose_of_the_largest_gaussian_values(values, expected):
    """‖v − V(v)‖² / ‖v‖² of the 64 largest values v of chunks of 4096, those of SparseLoCo.

    `sign` loses 1 − (E|v|)² / E v², which is 0.0121 of Gaussian values beyond the magnitude 2.418
    of one in 64, and a little more where every chunk has its own largest values. `two_bit` has a
    level for positive and one for negative values, and so loses the same. `qsgd:2` sends a value of
    64 of about equal magnitude with chance 1/8, as their norm over 1 + ω = 9, and so loses about
    1 − 2/9 + 8/81 = 0.877.
    """
    x = np.random.default_rng(0).normal(size=64 * 4096).astype(np.float32)
    kept = decoded(top_k(64), x)
    assert np.count_nonzero(kept) == 64 * 64
    assert lost(decoded(parse(f"top_k:64+{values}"), x), kept) == pytest.approx(expected, rel=0.02)


def test_what_sign_and_two_bit_lose_of_a_gaussian_tensor():
    """1 − 2/π, and 1 − Σ (φ(a) − φ(b))² / P(a, b) over the bins (a, b) of `two_bit`."""
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    normal, borders = statistics.NormalDist(), [-math.inf, -2.25, -0.75, 0.75, math.inf]
    kept = sum(
        (normal.pdf(a) - normal.pdf(b)) ** 2 / (normal.cdf(b) - normal.cdf(a))
        for a, b in itertools.pairwise(borders)
    )
    assert 1 - kept == pytest.approx(0.18, rel=0.01)
    # Three digits, as 100,000 values give them.
    assert lost(decoded(two_bit(), x), x) == pytest.approx(1 - kept, rel=0.01)
    assert lost(decoded(sign(), x), x) == pytest.approx(1 - 2 / math.pi, rel=0.01)


def int8_loop(x):
    out = []
    for start in range(0, len(x), 1024):
        bucket = x[start : start + 1024]
        scale = np.float32(max(abs(v) for v in bucket)) / np.float32(127)
        out += [float(np.rint(v / scale)) * float(scale) for v in bucket]
    return out


def test_int8_equals_its_loop():
    # Each of the two buckets needs its own scale.
    x = X * np.where(np.arange(1500) < 1024, 1, 1e-3).astype(np.float32)
    np.testing.assert_allclose(decoded(int8(), x), int8_loop(x), rtol=1e-6)
    integers = int8().encode(x, (), KEY)[0].values["integers"]
    assert integers.dtype == jnp.int8 and np.abs(integers).max() == 127


def test_bfloat16_equals_a_cast():
    np.testing.assert_array_equal(decoded(bfloat16(), X), np.float32(jnp.bfloat16(X)))


def qsgd_loop(x, bits, words):
    s = 2 ** (bits - 1) - 1
    omega = min(64 / s**2, 8 / s)
    # A word's lower half is drawn first.
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    out = []
    for start in range(0, len(x), 64):
        bucket = [float(v) for v in x[start : start + 64]]
        norm = math.sqrt(sum(v * v for v in bucket))
        for i, v in enumerate(bucket):
            exact = s * abs(v) / norm
            level = math.floor(exact)
            level += (halves[start + i] + 0.5) / 2**16 < exact - level
            out.append(math.copysign(level, v) * norm / s / (1 + omega))
    return out


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_qsgd_equals_its_loop(bits):
    x = X[:300]
    drawn = jax.random.bits(jax.random.fold_in(KEY, 1), (150,), jnp.uint32)
    expected = qsgd_loop(x, bits, np.asarray(drawn).tolist())
    np.testing.assert_allclose(decoded(qsgd(bits), x), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 4])
def test_qsgd_is_unbiased_up_to_its_factor(bits):
    x, code, count = X[:64], qsgd(bits), 4000
    once = lambda key: code.decode(code.encode(x, (), key), key, jnp.zeros(64), 1.0)
    draws = np.asarray(jax.jit(jax.vmap(once))(jax.random.split(KEY, count)))
    delta = code.delta(jnp.zeros(64))
    step = delta * np.linalg.norm(x) / (2 ** (bits - 1) - 1)
    chance = np.abs(delta * x / step) % 1
    # Five standard errors of a share, at least that of one draw, and the rounding of a chance to 16
    # bits, at most 2⁻¹⁷.
    margin = 5 * step * np.sqrt((chance * (1 - chance) + 1 / count) / count) + step / 2**17
    assert (np.abs(draws.mean(axis=0) - delta * x) < margin).all()


def test_qsgd_stays_within_its_levels_and_keeps_zeros():
    x = jnp.zeros(640).at[::64].set(-3.0)  # the norm of each bucket is its one value
    for bits in (2, 8):
        scale = qsgd(bits).delta(x)
        np.testing.assert_allclose(decoded(qsgd(bits), x), scale * x, rtol=1e-6)


def test_values_too_large_and_too_small_to_square():
    for size in (1e37, 1e-30):
        x = jnp.asarray(size * X[:64], jnp.float32)
        for code in (qsgd(8), two_bit()):
            np.testing.assert_allclose(decoded(code, x) / size, decoded(code, X[:64]), rtol=1e-4)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 39])
def test_unpacking_undoes_packing(bits, count):
    values = np.random.default_rng(bits).integers(2**bits, size=count).astype(np.uint8)
    packed = pack(jnp.asarray(values), bits)
    assert packed.size == math.ceil(len(values) * bits / 8) and packed.dtype == jnp.uint8
    text = "".join(f"{v:0{bits}b}" for v in values).ljust(8 * packed.size, "0")
    assert np.asarray(packed).tolist() == [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
    np.testing.assert_array_equal(unpack(packed, bits, len(values)), values)


def test_kept_values_are_encoded_like_a_tensor_of_them():
    largest = np.sort(np.abs(X))[-24:]
    sent = decoded(top_k(64, "tensor", values="int8"), X)
    np.testing.assert_allclose(np.sort(np.abs(sent[sent != 0])), largest, atol=largest.max() / 254)
    block = decoded(grbs(3, values="sign"), X)
    exact = decoded(grbs(3), X)
    np.testing.assert_array_equal(block != 0, exact != 0)
    np.testing.assert_allclose(np.abs(block[block != 0]), np.abs(exact[exact != 0]).mean(), 1e-6)


@pytest.mark.parametrize(
    "code, ratio",
    [(sign(), 32), (two_bit(), 16), (qsgd(2), 16), (qsgd(8), 4), (int8(), 4), (bfloat16(), 2)],
)
def test_ratios_are_those_of_the_papers(code, ratio):
    assert code.ratio == ratio
    assert grbs(8, values=code.name).ratio == 8 * ratio


@pytest.mark.parametrize("bits", [1, 9, 4.0, "4"])
def test_bits_out_of_range_are_an_error(bits):
    with pytest.raises(ConfigurationError) as error:
        qsgd(bits)
    assert str(error.value) == f"the bits of qsgd must be an integer from 2 to 8, got {bits!r}"
