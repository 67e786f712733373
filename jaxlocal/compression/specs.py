"""Compressors by their spec strings, such as `top_k:64+int8`."""

from jaxlocal.compression.codec import identity, zero
from jaxlocal.compression.grammar import Argument, Entry, build, check_text
from jaxlocal.compression.low_rank import powersgd
from jaxlocal.compression.quantize import BITS, bfloat16, int8, qsgd, sign, two_bit
from jaxlocal.compression.sparsify import grbs, random_k, top_k
from jaxlocal.compression.tensor_groups import grbs_tensors
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
    "two_bit": Entry(two_bit),
    "qsgd": Entry(qsgd, (BITS,)),
    "int8": Entry(int8),
    "bfloat16": Entry(bfloat16),
    "grbs_tensors": Entry(grbs_tensors, (RATIO, Argument("a number of groups", int, "8"))),
    "powersgd": Entry(powersgd, (Argument("a rank", int, "2"),)),
}


def parse(spec: str) -> Compressor:
    """Parse a compressor's spec string, NAME[:ARGUMENT[:OPTION]][+VALUES].

    | spec string | compressor |
    |---|---|
    | `identity`, `zero` | everything or nothing is sent |
    | `grbs:R`, `random_k:R` | one value in R, the same on all workers |
    | `grbs_tensors:R:G` | one value in R of one group of tensors in G, the same on all workers |
    | `top_k:R`, `top_k:R:GRANULARITY` | the largest values of a chunk, tensor or model |
    | `sign`, `two_bit`, `qsgd:BITS`, `int8`, `bfloat16` | every value in fewer bits |
    | `powersgd:RANK` | two factors of every matrix |
    | `top_k:R+VALUES`, … | a sparsifier whose kept values are coded by VALUES, a quantiser |

    Args:
      spec: the spec string.

    Returns:
      The compressor, whose `name` is the spec string in its shortest form.

    Raises:
      ConfigurationError: not a string, an unknown name, or an argument that is missing, superfluous
        or wrong.

    >>> parse("top_k:64+int8").ratio
    256.0
    """
    check_text("compressor", spec)
    base, plus, values = spec.partition("+")
    if not plus:
        return build("compressor", spec, COMPRESSORS)
    name = base.split(":")[0]
    if name in COMPRESSORS and name not in SPARSIFIERS:
        raise ConfigurationError(
            f"{name} is not a sparsifier whose kept values {values!r} could code, got {spec!r}; "
            f"the sparsifiers are {', '.join(SPARSIFIERS)}"
        )
    return build("compressor", base, COMPRESSORS, values=values)
