"""The block of a transformer: attention and a perceptron, for tokens of text and of images."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.layers import Linear
from jaxlocal.parallel.leaves import wide

EXPANSION = 4  # width of the hidden layer of a block, in widths of the model

Initializer = Callable[..., Any]


class Initializers(NamedTuple):
    """The distributions of a block's initial weights."""

    queries_keys_values: Initializer
    out: Initializer  # of the layer that ends the attention
    up: Initializer
    down: Initializer  # of the layer that ends the perceptron


class Attention(nnx.Module):
    """Self-attention with several heads; if it is causal, over a token and those before it."""

    def __init__(
        self,
        width: int,
        heads: int,
        initial: Initializers,
        causal: bool,
        use_bias: bool,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.causal = heads, causal
        self.queries_keys_values = Linear(
            width, 3 * width, use_bias=use_bias, kernel_init=initial.queries_keys_values, rngs=rngs
        )
        self.out = Linear(width, width, use_bias=use_bias, kernel_init=initial.out, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        batch, length, width = tokens.shape
        by_head = (batch, length, self.heads, width // self.heads)
        # With heads before length, both products are plain batched products, the fastest on CPU.
        parts = jnp.split(self.queries_keys_values(tokens), 3, axis=-1)
        queries, keys, values = (part.reshape(by_head).swapaxes(1, 2) for part in parts)
        scores = (queries / math.sqrt(queries.shape[-1])) @ keys.swapaxes(-1, -2)
        scores = scores.astype(wide(scores.dtype))
        if self.causal:
            past = jnp.tri(length, dtype=bool)[None, None]
            scores = jnp.where(past, scores, -jnp.inf)
        mixed = (jax.nn.softmax(scores).astype(values.dtype) @ values).swapaxes(1, 2)
        return self.out(mixed.reshape(batch, length, width))


class Block(nnx.Module):
    """Attention and a perceptron, each applied to normalised tokens and added to the tokens."""

    def __init__(
        self,
        width: int,
        heads: int,
        initial: Initializers,
        rngs: nnx.Rngs,
        *,
        causal: bool,
        attention_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        hidden = EXPANSION * width
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, initial, causal, attention_bias, rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = Linear(width, hidden, kernel_init=initial.up, rngs=rngs)
        self.down = Linear(hidden, width, kernel_init=initial.down, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        tokens = tokens + self.dropout(self.attention(self.norm1(tokens)))
        hidden = nnx.gelu(self.up(self.norm2(tokens)))
        return tokens + self.dropout(self.down(hidden))


def check_sizes(model: str, layers: int, width: int, heads: int) -> None:
    """Check the number of blocks, their width and their heads.

    Args:
      model: the model's name, for the error.
      layers: number of blocks.
      width: size of an embedding.
      heads: number of attention heads in each block.

    Raises:
      ConfigurationError: a number is less than 1, or the heads do not divide the width.

    >>> check_sizes("transformer", layers=2, width=64, heads=4)
    """
    for name, size in (("layers", layers), ("heads", heads)):
        if size < 1:
            raise ConfigurationError(f"{model} needs 1 or more {name}, got {size}")
    if width < 1 or width % heads:
        raise ConfigurationError(f"{heads} heads do not divide a width of {width}")
