"""Quantisers against slow loops, their packing and their bias."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlocal.compression import bfloat16, grbs, int8, qsgd, sign, top_k
from jaxlocal.compression.quantize import pack, unpack
from jaxlocal.errors import ConfigurationError

KEY = jax.random.key(5)
X = np.random.default_rng(0).normal(size=1500).astype(np.float32)


def heard(code, x, key=KEY):
    return np.asarray(code.decode(code.encode(x, (), key), key, jnp.zeros_like(x), 1.0))


def test_sign_is_its_loop():
    scale = sum(abs(float(v)) for v in X) / len(X)
    # The mean of 1500 float32 magnitudes.
    np.testing.assert_allclose(heard(sign(), X), [scale if v >= 0 else -scale for v in X], 1e-6)
    payload = sign().encode(X, (), KEY)[0].values
    byte = sum(int(v < 0) << (7 - i) for i, v in enumerate(X[:8]))
    assert int(payload["negative"][0]) == byte and payload["negative"].shape == (188,)


def int8_loop(x):
    out = []
    for start in range(0, len(x), 1024):
        bucket = x[start : start + 1024]
        scale = np.float32(max(abs(v) for v in bucket)) / np.float32(127)
        out += [float(np.rint(v / scale)) * float(scale) for v in bucket]
    return out


def test_int8_is_its_loop():
    x = X * np.where(np.arange(1500) < 1024, 1, 1e-3).astype(np.float32)  # a scale for each bucket
    np.testing.assert_allclose(heard(int8(), x), int8_loop(x), rtol=1e-6)
    integers = int8().encode(x, (), KEY)[0].values["integers"]
    assert integers.dtype == jnp.int8 and np.abs(integers).max() == 127


def test_bfloat16_is_its_cast():
    np.testing.assert_array_equal(heard(bfloat16(), X), np.float32(jnp.bfloat16(X)))


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
def test_qsgd_is_its_loop(bits):
    x = X[:300]
    drawn = jax.random.bits(jax.random.fold_in(KEY, 1), (150,), jnp.uint32)
    expected = qsgd_loop(x, bits, np.asarray(drawn).tolist())
    np.testing.assert_allclose(heard(qsgd(bits), x), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 4])
def test_qsgd_is_unbiased_up_to_its_factor(bits):
    x, code, count = X[:64], qsgd(bits), 4000
    once = lambda key: code.decode(code.encode(x, (), key), key, jnp.zeros(64), 1.0)
    draws = np.asarray(jax.jit(jax.vmap(once))(jax.random.split(KEY, count)))
    delta = code.delta(jnp.zeros(64))
    step = delta * np.linalg.norm(x) / (2 ** (bits - 1) - 1)
    chance = np.abs(delta * x / step) % 1
    # Five standard errors of a share, which for the rarest is at least one draw; and the 2⁻¹⁷ by
    # which a chance of 16 bits is off.
    margin = 5 * step * np.sqrt((chance * (1 - chance) + 1 / count) / count) + step / 2**17
    assert (np.abs(draws.mean(axis=0) - delta * x) < margin).all()


def test_qsgd_keeps_within_its_levels_and_zeros_zero():
    x = jnp.zeros(640).at[::64].set(-3.0)  # a bucket of one value is its own norm
    for bits in (2, 8):
        scale = qsgd(bits).delta(x)
        np.testing.assert_allclose(heard(qsgd(bits), x), scale * x, rtol=1e-6)


def test_values_too_large_and_too_small_to_square():
    for size in (1e37, 1e-30):
        x = jnp.asarray(size * X[:64], jnp.float32)
        np.testing.assert_allclose(heard(qsgd(8), x) / size, heard(qsgd(8), X[:64]), rtol=1e-4)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 39])
def test_packing_is_undone_by_unpacking(bits, count):
    values = np.random.default_rng(bits).integers(2**bits, size=count).astype(np.uint8)
    packed = pack(jnp.asarray(values), bits)
    assert packed.size == math.ceil(len(values) * bits / 8) and packed.dtype == jnp.uint8
    text = "".join(f"{v:0{bits}b}" for v in values).ljust(8 * packed.size, "0")
    assert np.asarray(packed).tolist() == [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
    np.testing.assert_array_equal(unpack(packed, bits, len(values)), values)


def test_kept_values_are_coded_like_a_tensor_of_them():
    largest = np.sort(np.abs(X))[-24:]
    sent = heard(top_k(64, "tensor", values="int8"), X)
    np.testing.assert_allclose(np.sort(np.abs(sent[sent != 0])), largest, atol=largest.max() / 254)
    block = heard(grbs(3, values="sign"), X)
    plain = heard(grbs(3), X)
    np.testing.assert_array_equal(block != 0, plain != 0)
    np.testing.assert_allclose(np.abs(block[block != 0]), np.abs(plain[plain != 0]).mean(), 1e-6)


@pytest.mark.parametrize(
    "code, ratio", [(sign(), 32), (qsgd(2), 16), (qsgd(8), 4), (int8(), 4), (bfloat16(), 2)]
)
def test_ratios_are_those_of_the_papers(code, ratio):
    assert code.ratio == ratio
    assert grbs(8, values=code.name).ratio == 8 * ratio


@pytest.mark.parametrize("bits", [1, 9, 4.0, "4"])
def test_bits_out_of_range_are_an_error(bits):
    with pytest.raises(ConfigurationError) as error:
        qsgd(bits)
    assert str(error.value) == f"the bits of qsgd must be an integer from 2 to 8, got {bits!r}"
