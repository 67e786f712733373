"""A vision transformer in its simple form: fixed positions, and a mean over the patches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlocal.errors import ConfigurationError
from jaxlocal.models.adapters import Model
from jaxlocal.models.attention import Block, Initializers, check_sizes
from jaxlocal.models.layers import Linear, Logits, image_sides
from jaxlocal.models.nnx_modules import from_nnx

LONGEST_WAVE = 10_000  # of the positions, in patches by 2 π


class VisionTransformer(nnx.Module):
    """Embeddings of patches, blocks, a norm, a mean over the patches, a dense layer."""

    def __init__(
        self,
        channels: int,
        outputs: int,
        patch: int,
        layers: int,
        width: int,
        heads: int,
        rngs: nnx.Rngs,
    ) -> None:
        self.patch = patch
        numbers = patch * patch * channels
        self.norm_of_patches = nnx.LayerNorm(numbers, rngs=rngs)
        self.embed = Linear(numbers, width, rngs=rngs)
        self.norm_of_embeddings = nnx.LayerNorm(width, rngs=rngs)
        # For the matrices of queries, keys and values one by one, this is Xavier's distribution.
        square, xavier = nnx.initializers.lecun_uniform(), nnx.initializers.xavier_uniform()
        initial = Initializers(square, out=square, up=xavier, down=xavier)
        block = partial(Block, width, heads, initial, rngs, causal=False, attention_bias=False)
        self.blocks = nnx.List([block() for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        zero = nnx.initializers.zeros_init()
        self.logits = Logits(width, outputs, kernel_init=zero, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        patches = _patches(images, self.patch)
        batch, rows, columns, numbers = patches.shape
        tokens = patches.reshape(batch, rows * columns, numbers)
        tokens = self.norm_of_embeddings(self.embed(self.norm_of_patches(tokens)))
        places = positions(rows, columns, tokens.shape[-1])
        tokens = tokens + jnp.asarray(places, tokens.dtype)[None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.logits(self.norm(tokens).mean(1))


def _patches(images: jax.Array, side: int) -> jax.Array:
    """Cut images into patches: `[batch, rows, columns, side * side * channels]`."""
    batch, height, width, channels = images.shape
    rows, columns = height // side, width // side
    cut = images.reshape(batch, rows, side, columns, side, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)


def positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Sines and cosines of the positions of patches in two dimensions, `[rows * columns, width]`.

    With m = width / 4 and ω_i = 10000^(-i / (m - 1)) for i = 0 … m - 1, the entries of the patch in
    row r and column c are sin(c ω_i), cos(c ω_i), sin(r ω_i) and cos(r ω_i), m of each.

    Args:
      rows, columns: numbers of patches.
      width: a multiple of 4, and 8 or more.

    >>> positions(1, 2, 8).round(2)
    array([[0.  , 0.  , 1.  , 1.  , 0.  , 0.  , 1.  , 1.  ],
           [0.84, 0.  , 0.54, 1.  , 0.  , 0.  , 1.  , 1.  ]])
    """
    row, column = np.divmod(np.arange(rows * columns), columns)
    waves = float(LONGEST_WAVE) ** -np.linspace(0, 1, width // 4)
    angles = [np.outer(place, waves) for place in (column, row)]
    return np.hstack([wave(angle) for angle in angles for wave in (np.sin, np.cos)])


def vision_transformer(
    input_shape: tuple[int, ...],
    outputs: int,
    patch: int = 16,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
) -> Model:
    """Vision transformer (SimpleViT, by default ViT-B/16): images to logits, without class token.

    An image is cut into patches of patch x patch pixels. Each is a token x = norm(dense(norm(its
    pixels))) + position, where positions are fixed sines and cosines of its row and column. Each
    layer sets x ← x + attention(norm(x)), then x ← x + mlp(norm(x)); each patch attends to all, and
    the MLP has 4 width hidden units with GELU. logits = dense(mean over the patches of norm(x)).
    Norms are LayerNorm, and attention has no biases.

    Initial weights are Xavier's uniform distribution in the blocks, LeCun's normal one in the
    embedding of the patches, and zero in the last layer; initial biases are zero.

    Args:
      input_shape: `(height, width, channels)` of one image, multiples of the patch.
      outputs: number of logits; with 1, outputs have shape `[batch]`.
      patch: height and width of a patch, in pixels.
      layers: number of blocks.
      width: size of an embedding, a multiple of 4, and 8 or more.
      heads: number of attention heads in each block, a divisor of `width`.

    Returns:
      The model, without model state.

    Raises:
      ConfigurationError: an example is not an image, the patch does not divide its height and
        width, the heads do not divide the width, or a size is out of range.

    >>> params, _ = jax.eval_shape(vision_transformer((224, 224, 3), 1000).init, jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    86381800

    References: L. Beyer, X. Zhai, A. Kolesnikov, Better plain ViT baselines for ImageNet-1k, 2022,
    https://arxiv.org/abs/2205.01580. With the norms around the embedding, and without the biases,
    it is the model of P. Wang's vit-pytorch (`SimpleViT`), which the experiments of QSR train: X.
    Gu et al., ICLR 2024, https://arxiv.org/abs/2310.14423.

    Differs from Beyer et al. in: those norms and biases, without which ViT-B/16 has 86,415,592
    parameters. Differs from vit-pytorch in: the initial weights, the approximation of GELU by tanh,
    and the place of the last norm, before the mean, which are those of Beyer et al.
    """
    sides = image_sides("vision_transformer", input_shape)
    if patch < 1 or sides[0] % patch or sides[1] % patch:
        raise ConfigurationError(
            f"patches of {patch} x {patch} do not divide images of {sides[0]} x {sides[1]}"
        )
    check_sizes("vision_transformer", layers, width, heads)
    if width < 8 or width % 4:
        raise ConfigurationError(
            f"vision_transformer needs a width that is a multiple of 4, from 8 on, got {width}"
        )
    sizes = (sides[2], outputs, patch, layers, width, heads)
    return from_nnx(lambda rngs: VisionTransformer(*sizes, rngs))
