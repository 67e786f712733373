"""Quantisers: every value is said, in fewer bits."""

import math
import numbers

import jax.numpy as jnp
from jax import lax

from jaxlocal.compression.arrays import rows, wide
from jaxlocal.compression.grammar import Argument, Entry, call
from jaxlocal.compression.codec import EVERYTHING, Codec, Coder, compressor
from jaxlocal.errors import ConfigurationError
from jaxlocal.types import Compressor, Leaf

QSGD_BUCKET, INT8_BUCKET = 64, 1024  # values that share a scale


def sign() -> Compressor:
    """One bit a value, and the mean magnitude of each tensor.

    C(x) = sign(x) · ‖x‖₁ / n of a tensor of n values. ‖x − C(x)‖² = ‖x‖² − ‖x‖₁² / n and ‖x‖₁ ≥ ‖x‖
    give δ = 1 / n: reached by a single value among zeros, while a Gaussian has 2 / π. Biased: SGD
    goes astray without error feedback.

    >>> code, x = sign(), jnp.array([3.0, -1.0, 2.0] * 9)
    >>> code.decode(code.encode(x, (), None), None, jnp.zeros(27), 1.0)[:3]
    Array([ 2., -2.,  2.], dtype=float32)

    Source: Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD", ICML 2019,
    https://arxiv.org/abs/1901.09847.
    """
    return _dense(_sign())


def qsgd(bits: int) -> Compressor:
    """Stochastic rounding to signed levels of a bucket's norm.

    In buckets of d = 64 values with s = 2^(bits − 1) − 1 levels on either side, x becomes
    ‖bucket‖ / s · l, where l is s · x / ‖bucket‖ rounded up or down at random so that its mean is
    right. Its variance is at most ω‖x‖² with ω = min(d / s², √d / s). What is read again is that
    over 1 + ω, which makes it a contraction: E C(x) = x / (1 + ω), δ = 1 / (1 + ω).

    Args:
      bits: of a level, 2 to 8.

    Raises:
      ConfigurationError: other bits.

    >>> qsgd(4).delta(jnp.zeros(5000))  # s = 7, ω = 8 / 7
    0.4666666666666667

    Source: Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD", NeurIPS 2017, https://arxiv.org/abs/1610.02132;
    scaled as by Basu, Data, Karakus, Diggavi, "Qsparse-local-SGD", NeurIPS 2019, https://arxiv.org/abs/1906.02367.
    """
    return _dense(_qsgd(bits))


def int8() -> Compressor:
    """Round to nearest among 255 multiples of a bucket's largest magnitude / 127.

    In buckets of c = min(n, 1024) values. An error is half a multiple at most, hence
    δ = 1 − c / 254².

    >>> int8().ratio, int8().granularity
    (4.0, 'chunk')
    """
    return _dense(_int8())


def bfloat16() -> Compressor:
    """Every value rounded to the nearest bfloat16.

    Its eight bits of precision make a relative error of at most 2⁻⁸: δ = 1 − 2⁻¹⁶.

    >>> bfloat16().ratio
    2.0
    """
    return _dense(_bfloat16())


def coder(spec: str) -> Coder:
    """How the kept values of a sparsifier are said, by its word.

    >>> coder("qsgd:4").ratio
    8.0
    """
    return call("value coder", spec, CODERS)


def _dense(kind: Coder) -> Compressor:
    granularity = {"sign": "tensor", "bfloat16": "value"}.get(kind.name, "chunk")
    return compressor(
        kind.name,
        Codec(EVERYTHING, kind, granularity),
        ratio=kind.ratio,
        shared_mask=False,
        unbiased=kind.unbiased,
    )


def _sign() -> Coder:
    def encode(x, words):
        magnitude = jnp.abs(x).astype(wide(x.dtype))
        return {"negative": jnp.packbits(x < 0), "scale": magnitude.mean()}

    def decode(payload, k):
        negative = jnp.unpackbits(payload["negative"], count=k).astype(bool)
        return jnp.where(negative, -payload["scale"], payload["scale"])

    return Coder("sign", lambda k: 0, encode, decode, lambda k: 1 / k, ratio=32.0, unbiased=False)


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
        chance = _chances(words)[: x.size]
        below = jnp.floor(exact)
        level = jnp.minimum(below + (chance < exact - below), levels)
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
    "qsgd": Entry(_qsgd, (BITS,)),
    "int8": Entry(_int8),
    "bfloat16": Entry(_bfloat16),
}


def pack(values: Leaf, bits: int) -> Leaf:
    """Values below 2^bits, uint8 [n] → uint8 [⌈n · bits / 8⌉], the first value's highest bit
    first.

    >>> pack(jnp.array([1, 2, 3, 0], jnp.uint8), 2)
    Array([108], dtype=uint8)
    """
    places = jnp.arange(bits - 1, -1, -1, dtype=jnp.uint8)
    return jnp.packbits((values[:, None] >> places) & 1)


def unpack(packed: Leaf, bits: int, count: int) -> Leaf:
    """The `count` values that were packed.

    >>> unpack(jnp.array([108], jnp.uint8), 2, 4)
    Array([1, 2, 3, 0], dtype=uint8)
    """
    digits = jnp.unpackbits(packed, count=count * bits).reshape(count, bits)
    places = jnp.arange(bits - 1, -1, -1, dtype=jnp.uint8)
    return (digits << places).sum(axis=1, dtype=jnp.uint8)


def _chances(words: Leaf) -> Leaf:
    """Two numbers between 0 and 1, neither included, of every random word: to draw words is most
    of what stochastic rounding costs."""
    halves = lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)
    return (halves.astype(jnp.float32) + 0.5) / 2**16


def _norms(buckets: Leaf) -> Leaf:
    """‖row‖ [buckets], of rows too large or too small to square as well."""
    largest = jnp.abs(buckets).max(axis=1)
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.linalg.norm(buckets / unit[:, None], axis=1)


def _scaled(values: Leaf, scale: Leaf, bucket: int) -> Leaf:
    """values [n] times the scale of their bucket."""
    return (rows(values, min(values.size, bucket)) * scale[:, None]).reshape(-1)[: values.size]
