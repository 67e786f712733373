"""Compressors by their words."""

from jaxlocal.compression.low_rank import powersgd
from jaxlocal.compression.quantize import BITS, bfloat16, int8, qsgd, sign
from jaxlocal.compression.sparsify import grbs, random_k, top_k
from jaxlocal.compression.grammar import Argument, Entry, call
from jaxlocal.compression.codec import identity, zero
from jaxlocal.errors import ConfigurationError
from jaxlocal.types import Compressor

RATIO = Argument("a ratio", float, "64")
GRANULARITY = Argument("a granularity", str, "tensor", optional=True)
SPARSIFIERS = {
    "grbs": Entry(grbs, (RATIO,)),
    "random_k": Entry(random_k, (RATIO,)),
    "top_k": Entry(top_k, (RATIO, GRANULARITY)),
}
COMPRESSORS = {
    "identity": Entry(identity),
    "zero": Entry(zero),
    **SPARSIFIERS,
    "sign": Entry(sign),
    "qsgd": Entry(qsgd, (BITS,)),
    "int8": Entry(int8),
    "bfloat16": Entry(bfloat16),
    "powersgd": Entry(powersgd, (Argument("a rank", int, "2"),)),
}


def parse(spec: str) -> Compressor:
    """The compressor that a word stands for: NAME[:ARG[:OPTION]][+VALUES].

    Args:
      spec: identity, zero, grbs:R, random_k:R, top_k:R, top_k:R:GRANULARITY (chunk, tensor or
        model), sign, qsgd:BITS, int8, bfloat16 or powersgd:RANK. After grbs, random_k and top_k,
        +int8, +qsgd:BITS, +bfloat16 or +sign says how the kept values are said.

    Raises:
      ConfigurationError: an unknown name, or an argument that is missing, superfluous or wrong.

    >>> parse("top_k:64+int8").ratio
    256.0
    """
    base, plus, values = spec.partition("+")
    if not plus:
        return call("compressor", spec, COMPRESSORS)
    name = base.split(":")[0]
    if name in COMPRESSORS and name not in SPARSIFIERS:
        raise ConfigurationError(
            f"{name} keeps no values that could be said by {values!r}, got {spec!r}: only "
            f"{', '.join(SPARSIFIERS)} do"
        )
    return call("compressor", base, COMPRESSORS, values=values)
