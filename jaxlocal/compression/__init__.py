"""Lossy compressors: each encodes a tree of arrays as a payload and decodes it.

Sparsifiers are `grbs`, `grbs_tensors`, `random_k` and `top_k`; quantisers `sign`, `two_bit`,
`qsgd`, `int8` and `bfloat16`; `powersgd` sends low-rank factors. `parse` reads a compressor's spec
string.

A compressor of your own is a `Coder` of values, made into one by `quantizer`; or a `Codec` of a
`Selection` and a coder, by `compressor`; or any `types.Compressor`. An `Entry` in `COMPRESSORS`
gives it a spec string.
"""

from jaxlocal.compression.codec import (
    EVERYTHING,
    UNCODED,
    Codec,
    Coder,
    Selection,
    compressor,
    identity,
    zero,
)
from jaxlocal.compression.grammar import Argument, Entry
from jaxlocal.compression.low_rank import powersgd
from jaxlocal.compression.payload import payload_bits, payload_shapes
from jaxlocal.compression.quantize import bfloat16, int8, qsgd, quantizer, sign, two_bit
from jaxlocal.compression.sparsify import grbs, random_k, top_k
from jaxlocal.compression.specs import COMPRESSORS, parse
from jaxlocal.compression.tensor_groups import grbs_tensors

__all__ = [
    "COMPRESSORS",
    "EVERYTHING",
    "UNCODED",
    "Argument",
    "Codec",
    "Coder",
    "Entry",
    "Selection",
    "bfloat16",
    "compressor",
    "grbs",
    "grbs_tensors",
    "identity",
    "int8",
    "parse",
    "payload_bits",
    "payload_shapes",
    "powersgd",
    "qsgd",
    "quantizer",
    "random_k",
    "sign",
    "top_k",
    "two_bit",
    "zero",
]
