"""A small decoder-only transformer, which predicts each token from the tokens before it."""

import math
from functools import partial

import jax
from flax import nnx

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.adapters import Model
from jaxlocal.models.attention import Block, Initializers, check_sizes
from jaxlocal.models.layers import Linear
from jaxlocal.models.nnx_modules import from_nnx

DEVIATION = 0.02  # of the initial weights


class Transformer(nnx.Module):
    """Embeddings of tokens and positions, blocks, a last normalisation, a dense layer."""

    def __init__(
        self,
        length: int,
        vocabulary: int,
        layers: int,
        width: int,
        heads: int,
        dropout: float,
        rngs: nnx.Rngs,
    ) -> None:
        normal = nnx.initializers.normal(DEVIATION)
        # Plain parameters, since nnx.Embed gives float32 for parameters of any dtype.
        self.tokens = nnx.Param(normal(rngs.params(), (vocabulary, width)))
        self.positions = nnx.Param(normal(rngs.params(), (length, width)))
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        end = nnx.initializers.normal(DEVIATION / math.sqrt(2 * layers))
        initial = Initializers(normal, out=end, up=normal, down=end)
        block = partial(Block, width, heads, initial, rngs, causal=True, dropout=dropout)
        self.blocks = nnx.List([block() for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.logits = Linear(width, vocabulary, kernel_init=normal, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = self.positions[...][: tokens.shape[1]]
        values = self.dropout(self.tokens[...][tokens] + positions[None])
        for block in self.blocks:
            values = block(values)
        return self.logits(self.norm(values))


def transformer(
    input_shape: tuple[int, ...],
    outputs: int,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    dropout: float = 0.0,
) -> Model:
    """Decoder-only transformer: integer tokens `[batch, length]` to logits of the next tokens.

    x = token embedding + position embedding. Each layer sets x ← x + attention(norm(x)), then
    x ← x + mlp(norm(x)); attention is causal, and the MLP has 4 width hidden units with GELU.
    logits = dense(norm(x)). Norms are LayerNorm, and position embeddings are learned. Initial
    weights are normal with standard deviation 0.02, or 0.02 / sqrt(2 layers) where an attention or
    an MLP ends; initial biases are zero.

    Args:
      input_shape: `(length,)`, the largest number of tokens in a sequence.
      outputs: number of tokens in the vocabulary, 2 or more.
      layers: number of blocks.
      width: size of an embedding.
      heads: number of attention heads in each block, a divisor of `width`.
      dropout: dropout rate of the embeddings, attentions and MLPs in training, in [0, 1).

    Returns:
      The model, without model state; its outputs have shape `[batch, length, outputs]`.

    Raises:
      ConfigurationError: an example is not a sequence, the heads do not divide the width, or a
        size or the rate is out of range.

    >>> model = transformer((16,), outputs=97, layers=2, width=32)
    >>> params, model_state = jax.eval_shape(model.init, jax.random.key(0))
    >>> tokens = jax.ShapeDtypeStruct((8, 16), "int32")
    >>> logits, _ = jax.eval_shape(
    ...     lambda *arguments: model.apply(*arguments, None, True), params, model_state, tokens
    ... )
    >>> logits.shape
    (8, 16, 97)

    References: A. Vaswani et al., Attention Is All You Need, NeurIPS 2017,
    https://arxiv.org/abs/1706.03762. Arrangement and initial weights: A. Radford et al., Language
    Models are Unsupervised Multitask Learners, 2019.

    Differs from the latter in: the matrix of the logits is not that of the token embeddings, and
    attention weights are never dropped.
    """
    if len(input_shape) != 1:
        wanted = "sequences of tokens [length]"
        raise ConfigurationError(
            f"transformer needs {wanted}; the examples have shape {input_shape}"
        )
    if outputs < 2:
        raise ConfigurationError(
            f"transformer needs a vocabulary of 2 tokens or more, got {outputs}: it is for "
            "sequences of tokens, such as the dataset docstrings"
        )
    check_sizes("transformer", layers, width, heads)
    if not 0 <= dropout < 1:
        raise ConfigurationError(f"dropout must be in [0, 1), got {dropout}")
    sizes = (input_shape[0], outputs, layers, width, heads, dropout)
    return from_nnx(lambda rngs: Transformer(*sizes, rngs))
