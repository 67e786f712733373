"""Quantisers: every value is sent, in fewer bits.

Each is a compressor of whole tensors, and a coder of the values that a sparsifier keeps.
"""

import math
import numbers

import jax.numpy as jnp
from jax import lax

from jaxlocal.compression.arrays import pack, rows, unpack, wide
from jaxlocal.compression.codec import EVERYTHING, Codec, Coder, compressor
from jaxlocal.compression.grammar import Argument, Entry, build
from jaxlocal.errors import ConfigurationError
from jaxlocal.types import Compressor, Leaf

QSGD_BUCKET, INT8_BUCKET = 64, 1024  # values that share a scale
BIN_WIDTH = 1.5  # of `two_bit`, in standard deviations: 4 bins over a range of 6


def sign() -> Compressor:
    """Quantise every value to its sign, one bit, times the mean magnitude of its tensor.

        C(x) = sign(x) · ‖x‖₁ / n of a tensor of n values

    ‖x − C(x)‖² = ‖x‖² − ‖x‖₁² / n and ‖x‖₁ ≥ ‖x‖ give δ = 1 / n. A single value among zeros
    reaches it; a Gaussian tensor has 2 / π. C is biased: SGD needs error feedback with it.

    Returns:
      The compressor `sign`. A tensor takes n bits and a float32 scale.

    >>> code, x = sign(), jnp.array([3.0, -1.0, 2.0] * 9)
    >>> code.decode(code.encode(x, (), None), None, jnp.zeros(27), 1.0)[:3]
    Array([ 2., -2.,  2.], dtype=float32)

    Source: Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD", ICML 2019,
    https://arxiv.org/abs/1901.09847.
    """
    return quantizer(_sign())


def two_bit() -> Compressor:
    """Quantise every value to the mean of its bin, one of four: the 2-bit code of SparseLoCo.

        bin(x) = round((x − μ) / (1.5 σ) + 2), clipped to 0, 1, 2, 3
        C(x) = the mean of the values in the bin of x

    μ and σ are the mean and the standard deviation (over n − 1) of the n values of a tensor, or of
    those that a sparsifier keeps of it. The bins are not symmetric: their borders are μ − 2.25 σ,
    μ − 0.75 σ and μ + 0.75 σ. The largest values of a tensor lie near ±σ, in two of the bins, so
    that the code is close to `sign` on them: of the 64 largest of 4096 Gaussian values both lose
    1.2 % of ‖x‖², while `qsgd(2)` loses 87 %. Of a whole Gaussian tensor `two_bit` loses 18 % and
    `sign` 36 %.

    δ = 3 (s − 3/4) / (n − 1) with s = √(7 (n − 1) / 16). Proof: let y = (x − μ) / σ, so that
    Σ y² = n − 1. Let N values lie outside the bin around the mean, |y| > 3/4, and A = Σ |y| over
    them. Their Σ y² is at least n − 1 − 9 (n − N) / 16, hence A ≥ 3 (N − 1) / 4 + s, which is
    reached where N − 1 of them have |y| = 3/4. In each of their bins all y have one sign, hence by
    Cauchy-Schwarz the means of these bins keep A² / N ≥ 3 (s − 3/4) of Σ y². Up to four values have
    a bin each, and δ = 1. C is biased: SGD needs error feedback with it.

    Returns:
      The compressor `two_bit`. A tensor takes 2 n bits and four float32 levels.

    >>> code, x = two_bit(), jnp.array([4.0, -3.0, 3.0, -4.0] * 9)
    >>> code.decode(code.encode(x, (), None), None, jnp.zeros(36), 1.0)[:4]
    Array([ 3.5, -3.5,  3.5, -3.5], dtype=float32)

    Source: the quantiser of the released code of Sarfi, Thérien, Lidin, Belilovsky, "Communication
    Efficient LLM Pre-training with SparseLoCo", 2025, https://arxiv.org/abs/2508.15706, in
    https://github.com/tplr-ai/CCLoco (`TopKCompressor`, with 4 bins for 2 bits). Differs from it
    in: a payload has the four means, not μ and the means less μ; up to four values are exact.
    """
    return quantizer(_two_bit())


def qsgd(bits: int) -> Compressor:
    """Quantise values by stochastic rounding to signed levels of their bucket's norm, as QSGD does.

        C(x) = ‖bucket‖ / s · l / (1 + ω),  s = 2^(bits − 1) − 1

    A bucket has d = 64 values. The level l is s · x / ‖bucket‖, rounded up or down at random so
    that its mean is right. The variance of ‖bucket‖ / s · l is at most ω‖x‖² with
    ω = min(d / s², √d / s), and the division by 1 + ω makes C a contraction: E C(x) = x / (1 + ω),
    δ = 1 / (1 + ω).

    Args:
      bits: the bits of a level, 2 to 8.

    Returns:
      The compressor `qsgd:BITS`. A tensor of n values takes n · bits bits and a float32 norm for
      every bucket.

    Raises:
      ConfigurationError: `bits` is not an integer from 2 to 8.

    >>> qsgd(4).delta(jnp.zeros(5000))  # s = 7, ω = 8 / 7
    0.4666666666666667

    Source: Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD", NeurIPS 2017, https://arxiv.org/abs/1610.02132;
    scaled as by Basu, Data, Karakus, Diggavi, "Qsparse-local-SGD", NeurIPS 2019, https://arxiv.org/abs/1906.02367.
    """
    return quantizer(_qsgd(bits), "chunk")


def int8() -> Compressor:
    """Round every value to the nearest of 255 multiples of its bucket's largest magnitude / 127.

    A bucket has c = min(n, 1024) of the n values of a tensor. An error is at most half a multiple,
    hence δ = 1 − c / 254².

    Returns:
      The compressor `int8`. A tensor takes 8 n bits and a float32 scale for every bucket.

    >>> int8().ratio, int8().granularity
    (4.0, 'chunk')
    """
    return quantizer(_int8(), "chunk")


def bfloat16() -> Compressor:
    """Round every value to the nearest bfloat16.

    Eight bits of precision give a relative error of at most 2⁻⁸: δ = 1 − 2⁻¹⁶.

    Returns:
      The compressor `bfloat16`. A tensor of n values takes 16 n bits.

    >>> bfloat16().ratio
    2.0
    """
    return quantizer(_bfloat16(), "value")


def coder(spec: str) -> Coder:
    """Parse the spec string of a coder, which encodes the values that a sparsifier keeps.

    Args:
      spec: `sign`, `two_bit`, `qsgd:BITS`, `int8` or `bfloat16`.

    Returns:
      The coder.

    Raises:
      ConfigurationError: an unknown name, or an argument that is missing, superfluous or wrong.

    >>> coder("qsgd:4").ratio
    8.0
    """
    return build("value coder", spec, CODERS)


def quantizer(coder: Coder, granularity: str = "tensor") -> Compressor:
    """Make the compressor that sends every value with a coder.

    Args:
      coder: how the values of a tensor are encoded.
      granularity: "tensor", or what the coder itself encodes as one piece: "chunk" or "value".

    >>> quantizer(_sign()).name
    'sign'
    """
    return compressor(
        coder.name,
        Codec(EVERYTHING, coder, granularity),
        ratio=coder.ratio,
        shared_mask=False,
        unbiased=coder.unbiased,
    )


def _sign() -> Coder:
    def encode(x, words):
        magnitude = jnp.abs(x).astype(wide(x.dtype))
        return {"negative": jnp.packbits(x < 0), "scale": magnitude.mean()}

    def decode(payload, k):
        negative = jnp.unpackbits(payload["negative"], count=k).astype(bool)
        return jnp.where(negative, -payload["scale"], payload["scale"])

    return Coder("sign", lambda k: 0, encode, decode, lambda k: 1 / k, ratio=32.0, unbiased=False)


def _two_bit() -> Coder:
    def encode(x, words):
        x = x.astype(wide(x.dtype))
        bins = _bins(x) if x.size > 4 else jnp.arange(x.size, dtype=x.dtype)
        inside = bins[None] == jnp.arange(4, dtype=x.dtype)[:, None]
        counts = jnp.maximum(inside.sum(axis=1), 1).astype(x.dtype)
        levels = jnp.where(inside, x[None], 0).sum(axis=1) / counts
        return {"bins": pack(bins.astype(jnp.uint8), 2), "levels": levels}

    def decode(payload, k):
        return payload["levels"][unpack(payload["bins"], 2, k)]

    def delta(k):
        return 1.0 if k <= 4 else 3 * (math.sqrt(7 * (k - 1) / 16) - 0.75) / (k - 1)

    return Coder("two_bit", lambda k: 0, encode, decode, delta, ratio=16.0, unbiased=False)


def _bins(x: Leaf) -> Leaf:
    """The bin of every value, 0 to 3; 2 is around the mean."""
    centred = x - x.mean()
    width = BIN_WIDTH * _norms(centred[None])[0] / math.sqrt(x.size - 1)
    return jnp.clip(jnp.round(centred / jnp.where(width > 0, width, 1) + 2), 0, 3)


def _qsgd(bits: int) -> Coder:
    if not isinstance(bits, numbers.Integral) or not 2 <= bits <= 8:
        raise ConfigurationError(f"the bits of qsgd must be an integer from 2 to 8, got {bits!r}")
    levels = 2 ** (int(bits) - 1) - 1
    omega = min(QSGD_BUCKET / levels**2, math.sqrt(QSGD_BUCKET) / levels)

    def encode(x, words):
        buckets = rows(x.astype(wide(x.dtype)), min(x.size, QSGD_BUCKET))
        norm = _norms(buckets)
        exact = levels * (jnp.abs(buckets) / jnp.where(norm > 0, norm, 1)[:, None])
        exact = exact.reshape(-1)[: x.size]
        chance = _chances(words)[: x.size].astype(exact.dtype)
        below = jnp.floor(exact)
        level = jnp.minimum(below + (chance < exact - below).astype(below.dtype), levels)
        signed = jnp.where(x < 0, -level, level) + levels
        return {"levels": pack(signed.astype(jnp.uint8), bits), "norm": norm}

    def decode(payload, k):
        signed = unpack(payload["levels"], bits, k).astype(payload["norm"].dtype) - levels
        return _scaled(signed, payload["norm"] / (levels * (1 + omega)), QSGD_BUCKET)

    def delta(k):
        return 1 / (1 + omega)

    words = lambda k: -(-k // 2)
    return Coder(f"qsgd:{bits}", words, encode, decode, delta, 32 / bits, unbiased=True)


def _int8() -> Coder:
    def encode(x, words):
        buckets = rows(x.astype(wide(x.dtype)), min(x.size, INT8_BUCKET))
        scale = jnp.abs(buckets).max(axis=1) / 127
        values = jnp.round(buckets / jnp.where(scale > 0, scale, 1)[:, None])
        values = jnp.clip(values, -127, 127).astype(jnp.int8)
        return {"integers": values.reshape(-1)[: x.size], "scale": scale}

    def decode(payload, k):
        integers = payload["integers"].astype(payload["scale"].dtype)
        return _scaled(integers, payload["scale"], INT8_BUCKET)

    def delta(k):
        return 1 - min(k, INT8_BUCKET) / 254**2

    return Coder("int8", lambda k: 0, encode, decode, delta, ratio=4.0, unbiased=False)


def _bfloat16() -> Coder:
    return Coder(
        "bfloat16",
        words=lambda k: 0,
        encode=lambda x, words: x.astype(jnp.bfloat16),
        decode=lambda payload, k: payload,
        delta=lambda k: 1 - 2.0**-16,
        ratio=2.0,
        unbiased=True,
    )


BITS = Argument("a number of bits", int, "4")
CODERS = {
    "sign": Entry(_sign),
    "two_bit": Entry(_two_bit),
    "qsgd": Entry(_qsgd, (BITS,)),
    "int8": Entry(_int8),
    "bfloat16": Entry(_bfloat16),
}


def _chances(words: Leaf) -> Leaf:
    """Two uniform numbers in (0, 1) from every random word.

    Random words are most of the cost of stochastic rounding, and 16 bits for each chance suffice.
    """
    halves = lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)
    return (halves.astype(jnp.float32) + 0.5) / 2**16


def _norms(buckets: Leaf) -> Leaf:
    """The norm of every row, [buckets], also where the squares would overflow or vanish."""
    largest = jnp.abs(buckets).max(axis=1)
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.linalg.norm(buckets / unit[:, None], axis=1)


def _scaled(values: Leaf, scale: Leaf, bucket: int) -> Leaf:
    """values [n] times the scale of their bucket."""
    return (rows(values, min(values.size, bucket)) * scale[:, None]).reshape(-1)[: values.size]
