"""What a compressor sends of a tree: the shapes of its payloads and their bits."""

import jax

from jaxlocal.compression.arrays import tree_bits
from jaxlocal.types import Compressor, Tree


def payload_bits(compressor: Compressor, like: Tree) -> int:
    """Count the bits that one worker sends to communicate a tree, second message included.

    Args:
      compressor: C.
      like: the worker's tree, leaves [...]: arrays or their shapes.

    Returns:
      The bits of all arrays of the payload, in the dtypes that cross the wire.

    Raises:
      ConfigurationError: the compressor does not fit the tree.

    >>> import jax.numpy as jnp
    >>> from jaxlocal.compression import top_k
    >>> payload_bits(top_k(64), {"w": jnp.zeros((64, 64))})  # 64 float32 values, uint16 indices
    3072
    """
    return tree_bits(payload_shapes(compressor, like))


def payload_shapes(compressor: Compressor, like: Tree) -> list[Tree]:
    """Compute the shapes of the payloads that one worker sends, without running the compressor.

    Args:
      compressor: C.
      like: the worker's tree, leaves [...]: arrays or their shapes.

    Returns:
      One tree of shapes for each message: two if the compressor sends a second message.

    Raises:
      ConfigurationError: the compressor does not fit the tree.

    >>> import jax.numpy as jnp
    >>> from jaxlocal.compression import identity
    >>> payload_shapes(identity(), [jnp.zeros(3)])
    [[ShapeDtypeStruct(shape=(3,), dtype=float32)]]
    """

    def payloads(tree):
        key, second = jax.random.key(0), compressor.second
        first = compressor.encode(tree, compressor.init(tree), key)
        return [first, second.encode(tree, second.settle(first), key)] if second else [first]

    return jax.eval_shape(payloads, like)
