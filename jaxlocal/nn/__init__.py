"""Layers that stay fast where many workers train in a loop: drop-ins for those of JAX and Flax."""

from jaxlocal.nn.convolution import conv_general_dilated
from jaxlocal.nn.pooling import avg_pool, max_pool

__all__ = ["avg_pool", "conv_general_dilated", "max_pool"]
