"""Lossy messages: what a worker says of a tree, and what others read in it."""

from jaxlocal.compression.low_rank import powersgd
from jaxlocal.compression.specs import COMPRESSORS, parse
from jaxlocal.compression.quantize import bfloat16, int8, qsgd, sign
from jaxlocal.compression.sparsify import grbs, random_k, top_k
from jaxlocal.compression.codec import identity, payload_bits, payload_shapes, zero

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
    "zero",
]
