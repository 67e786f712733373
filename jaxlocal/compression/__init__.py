"""Lossy compressors: each encodes a tree of arrays as a payload and decodes it.

Sparsifiers are `grbs`, `random_k` and `top_k`; quantisers `sign`, `two_bit`, `qsgd`, `int8` and
`bfloat16`; `powersgd` sends low-rank factors. `parse` reads a compressor's spec string.
"""

from jaxlocal.compression.codec import identity, zero
from jaxlocal.compression.low_rank import powersgd
from jaxlocal.compression.payload import payload_bits, payload_shapes
from jaxlocal.compression.quantize import bfloat16, int8, qsgd, sign, two_bit
from jaxlocal.compression.sparsify import grbs, random_k, top_k
from jaxlocal.compression.specs import COMPRESSORS, parse

__all__ = [
    "COMPRESSORS",
    "bfloat16",
    "grbs",
    "identity",
    "int8",
    "parse",
    "payload_bits",
    "payload_shapes",
    "powersgd",
    "qsgd",
    "random_k",
    "sign",
    "top_k",
    "two_bit",
    "zero",
]
