"""A small decoder-only transformer: it predicts each token from those before it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.adapters import Model, from_nnx

DEVIATION = 0.02  # of the initial weights
EXPANSION = 4  # width of the hidden layer of a block, in widths of the model


class Attention(nnx.Module):
    """Heads that each mix the values of the tokens up to their own."""

    def __init__(self, width: int, heads: int, deviation: float, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.queries_keys_values = _dense(width, 3 * width, DEVIATION, rngs)
        self.out = _dense(width, width, deviation, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        batch, length, width = tokens.shape
        split = (batch, length, 3, self.heads, width // self.heads)
        # Heads before length, so that both products are plain batched ones, the fastest on CPU.
        parts = self.queries_keys_values(tokens).reshape(split).transpose(2, 0, 3, 1, 4)
        queries, keys, values = parts
        scores = queries @ keys.swapaxes(-1, -2) / math.sqrt(queries.shape[-1])
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        past = jnp.tri(length, dtype=bool)
        shares = jax.nn.softmax(jnp.where(past, scores, -jnp.inf)).astype(values.dtype)
        mixed = (shares @ values).swapaxes(1, 2)
        return self.out(mixed.reshape(batch, length, width))


class Block(nnx.Module):
    """Attention and a perceptron, each on normalised tokens and added to them."""

    def __init__(
        self, width: int, heads: int, deviation: float, dropout: float, rngs: nnx.Rngs
    ) -> None:
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, deviation, rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = _dense(width, EXPANSION * width, DEVIATION, rngs)
        self.down = _dense(EXPANSION * width, width, deviation, rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        tokens = tokens + self.dropout(self.attention(self.norm1(tokens)))
        hidden = nnx.gelu(self.up(self.norm2(tokens)))
        return tokens + self.dropout(self.down(hidden))


class Transformer(nnx.Module):
    """Embeddings of tokens and places, blocks, a last normalisation, a dense layer."""

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
        # Tables of one's own: nnx.Embed gives float32 whatever the type of its parameters.
        self.tokens = nnx.Param(normal(rngs.params(), (vocabulary, width)))
        self.places = nnx.Param(normal(rngs.params(), (length, width)))
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        deviation = DEVIATION / math.sqrt(2 * layers)
        self.blocks = nnx.List(
            [Block(width, heads, deviation, dropout, rngs) for _ in range(layers)]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.logits = _dense(width, vocabulary, DEVIATION, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        places = self.places[...][: tokens.shape[1]]
        values = self.dropout(self.tokens[...][tokens] + places)
        for block in self.blocks:
            values = block(values)
        return self.logits(self.norm(values))


def _dense(ins: int, outs: int, deviation: float, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(ins, outs, kernel_init=nnx.initializers.normal(deviation), rngs=rngs)


def transformer(
    input_shape: tuple[int, ...],
    outputs: int,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    dropout: float = 0.0,
) -> Model:
    """A language model: integer tokens `[batch, length]` to the logits of the next, `[batch,
    length, outputs]`.

    x = token + place; in each layer x ← x + attention(norm(x)), x ← x + mlp(norm(x)), where
    attention is causal and the MLP has 4 widths of hidden units with GELU; logits = dense(norm(x)).
    Norms are LayerNorm; places are learned. Weights start normal with deviation 0.02, those that
    end a branch with 0.02 / sqrt(2 layers); biases start at zero.

    Args:
      input_shape: `(length,)`, the most tokens of a sequence; shorter ones are taken too.
      outputs: number of tokens in the vocabulary, 2 or more.
      layers: number of blocks.
      width: numbers that stand for a token.
      heads: of the attention in each block; they divide the width.
      dropout: rate at which the embedding and the branches drop numbers in training.

    Raises:
      ConfigurationError: an example is no sequence, the heads do not divide the width, or a size
        or the rate is out of range.

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

    Differs from the latter in: logits have a matrix of their own, and attention weights are never
    dropped.
    """
    if len(input_shape) != 1:
        wanted = "sequences of tokens [length]"
        raise ConfigurationError(
            f"transformer needs {wanted}; the examples have shape {input_shape}"
        )
    if outputs < 2:
        raise ConfigurationError(
            f"transformer tells 2 tokens or more apart, got {outputs}: it is for sequences of "
            "tokens, such as the dataset docstrings"
        )
    for name, size in (("layers", layers), ("heads", heads)):
        if size < 1:
            raise ConfigurationError(f"transformer needs 1 or more {name}, got {size}")
    if width < 1 or width % heads:
        raise ConfigurationError(f"{heads} heads do not divide a width of {width}")
    if not 0 <= dropout < 1:
        raise ConfigurationError(f"dropout must be in [0, 1), got {dropout}")
    sizes = (input_shape[0], outputs, layers, width, heads, dropout)
    return from_nnx(lambda rngs: Transformer(*sizes, rngs))
