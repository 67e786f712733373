"""Convolution, pooling and dense layers that stay fast in a compiled training loop on CPU.

They replace those of JAX and Flax: `fast_layers` replaces them in a loss that is already written.
"""

from jaxlocal.nn.convolution import conv_general_dilated
from jaxlocal.nn.dense import dot_general
from jaxlocal.nn.pooled import conv_relu_max_pool
from jaxlocal.nn.pooling import avg_pool, max_pool
from jaxlocal.nn.rewriting import fast_layers, fast_layers_report

__all__ = [
    "avg_pool",
    "conv_general_dilated",
    "conv_relu_max_pool",
    "dot_general",
    "fast_layers",
    "fast_layers_report",
    "max_pool",
]
