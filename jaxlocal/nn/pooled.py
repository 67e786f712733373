"""A small convolution with its bias, relu and max-pooling as one layer.

Networks for small images spend most of their time in these layers, and with few channels the time
goes into memory traffic. Here one matrix product computes the 2 x 2 pixels of a pooling window in
all channels, from the patch of the image that they read, and the pooling is the maximum of four
rows of the product. The batch is the last dimension of all arrays, so that arithmetic runs along
the batch.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxlocal.nn.convolution import conv_general_dilated, equally_varying
from jaxlocal.nn.pooling import max_pool

POOL = (2, 2)
# With more channels, three separate layers are as fast: the patch of a window is larger than the
# kernel. This was measured on CPU, for kernels of 3 x 3 and 5 x 5 and images of 14 x 14 to 32 x 32.
MOST_IN, MOST_OUT = 16, 64


def conv_relu_max_pool(images: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Convolution, bias, relu and max-pooling of 2 x 2 as one layer, which is fast on CPU.

    It computes max_pool(relu(conv(images, kernel) + bias)) with stride 1 and padding "SAME". The
    fast form is for at most 16 input and 64 output channels; with more, and on other backends than
    CPU, it runs as three layers. Values and gradients equal those of the three layers up to the
    order of summation. It is a `jax.custom_vjp`, which allows reverse mode only, as
    `conv_general_dilated` does.

    Args:
      images: `[batch, height, width, in]`, height and width of 2 or more. The convolution reads an
        odd last row or column, and the pooling drops it.
      kernel: `[height, width, in, out]`, of the same dtype.
      bias: `[out]`, of the same dtype.

    Returns:
      `[batch, height // 2, width // 2, out]`.

    Raises:
      TypeError, ValueError: the shapes or dtypes do not fit each other, as in `jax.lax`.

    >>> images, kernel = jnp.ones((4, 28, 28, 1)), jnp.ones((5, 5, 1, 10))
    >>> conv_relu_max_pool(images, kernel, jnp.zeros(10)).shape
    (4, 14, 14, 10)
    """
    jax.eval_shape(_by_layers, images, kernel, bias)  # raises the errors of jax.lax
    return _pooled(*equally_varying(images, kernel, bias))


def pays(sides: Sequence[int], ins: int, outs: int) -> bool:
    """Whether the fast form of `conv_relu_max_pool` applies, and is faster than three layers.

    Args:
      sides: height and width of the images, in pixels.
      ins, outs: channels of the images, and of the convolution's output.

    >>> pays((28, 28), 1, 10), pays((28, 28), 32, 64)
    (True, False)
    """
    return min(sides) >= max(POOL) and ins <= MOST_IN and outs <= MOST_OUT


@jax.custom_vjp
def _pooled(images: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    fast = _fast_form(images, kernel)
    return lax.platform_dependent(images, kernel, bias, cpu=fast, default=_by_layers)


def _fast_form(images: jax.Array, kernel: jax.Array) -> Callable[..., jax.Array]:
    few = pays(images.shape[1:3], *kernel.shape[2:])
    return _by_windows if few and images.size and kernel.size else _by_layers


def _forward(*operands: jax.Array) -> tuple[jax.Array, Any]:
    return _pooled(*operands), operands


def _backward(operands: Any, cotangent: jax.Array) -> tuple[jax.Array, ...]:
    gradients = lambda form: lambda cotangent, *operands: jax.vjp(form, *operands)[1](cotangent)
    fast = _fast_form(*operands[:2])
    return lax.platform_dependent(
        cotangent, *operands, cpu=gradients(fast), default=gradients(_by_layers)
    )


_pooled.defvjp(_forward, _backward)


def _by_layers(images: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    convolved = conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout)
    return max_pool(nnx.relu(convolved + bias.reshape(1, 1, 1, -1)), POOL, POOL)


def _by_windows(images: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    batch, height, width, _ = images.shape
    windows = (height // 2, width // 2)
    patches = _patches(images, kernel.shape[:2])
    pixels = lax.dot_general(_kernel_of_windows(kernel), patches, (((0,), (0,)), ((), ())))
    return _pool_windows((*windows, batch), pixels, bias).transpose(3, 1, 2, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool_windows(shape: tuple[int, ...], pixels: jax.Array, bias: jax.Array) -> jax.Array:
    """relu(maximum + bias) of four pixels [4 · out, windows · batch], to [out, *shape]."""
    pooled = nnx.relu(_largest(pixels.reshape(4, bias.size, -1)) + bias[:, None])
    return pooled.reshape(-1, *shape)


def _pool_forward(
    shape: tuple[int, ...], pixels: jax.Array, bias: jax.Array
) -> tuple[jax.Array, Any]:
    return _pool_windows(shape, pixels, bias), (pixels, bias)


def _pool_backward(
    shape: tuple[int, ...], operands: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of equal pixels, the first gets the gradient."""
    pixels, bias = operands
    # In the shape of the image: XLA fuses it with the sum over patches, which is slow in any other.
    positive = jnp.where(_pool_windows(shape, pixels, bias) > 0, cotangent, 0)
    rows = positive.reshape(bias.size, -1)
    pixels = pixels.reshape(4, *rows.shape)
    equal = list(pixels == _largest(pixels)[None])
    earlier = itertools.accumulate(equal[:-1], jnp.logical_or)
    first = [equal[0], *(a & ~b for a, b in zip(equal[1:], earlier, strict=True))]
    return jnp.concatenate([jnp.where(here, rows, 0) for here in first]), positive.sum((1, 2, 3))


_pool_windows.defvjp(_pool_forward, _pool_backward)


def _largest(pixels: jax.Array) -> jax.Array:
    # Not `pixels.max(0)`, which XLA:CPU computes in a pass of its own.
    return functools.reduce(jnp.maximum, list(pixels))


def _patches(images: jax.Array, taps: tuple[int, ...]) -> jax.Array:
    """The patches of all windows in blocks of 2 x 2 pixels: [blocks · 4 · in, windows · batch]."""
    batch, *sides, channels = images.shape
    windows = [side // 2 for side in sides]
    blocks = [tap // 2 + 1 for tap in taps]
    pads = [(0, 0, 0)]
    for side, window, block, tap in zip(sides, windows, blocks, taps, strict=True):
        low = (tap - 1) // 2
        pads.append((low, 2 * (window + block - 1) - side - low, 0))
    image = lax.pad(images.transpose(3, 1, 2, 0), jnp.zeros((), images.dtype), [*pads, (0, 0, 0)])
    down, across = (window + block - 1 for window, block in zip(windows, blocks, strict=True))
    image = image.reshape(channels, down, 2, across, 2, batch).transpose(2, 4, 0, 1, 3, 5)
    return _lay_out((blocks[0], blocks[1]), image.reshape(4 * channels, down, across, batch))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lay_out(blocks: tuple[int, int], image: jax.Array) -> jax.Array:
    """The blocks that each window reads: [blocks · rows, windows · batch].

    Args:
      blocks: down and across, of one patch.
      image: `[rows, down, across, batch]`.

    The blocks across come first, so that those down are long contiguous pieces.
    """
    windows = [size - block + 1 for size, block in zip(image.shape[1:3], blocks, strict=True)]
    image = jnp.concatenate([image[:, :, j : j + windows[1]] for j in range(blocks[1])])
    line = windows[1] * image.shape[3]
    image = image.reshape(image.shape[0], -1)
    return jnp.concatenate([image[:, i * line : (i + windows[0]) * line] for i in range(blocks[0])])


def _lay_out_forward(blocks: tuple[int, int], image: jax.Array) -> tuple[jax.Array, Any]:
    return _lay_out(blocks, image), image


def _lay_out_backward(
    blocks: tuple[int, int], image: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array]:
    """Sum all blocks in one pass; the transpose of `_lay_out` takes one for each dimension."""
    _, down, across, _ = image.shape

    def in_one_step(image: jax.Array) -> jax.Array:
        moved = [
            image[:, i : down - blocks[0] + 1 + i, j : across - blocks[1] + 1 + j]
            for i in range(blocks[0])
            for j in range(blocks[1])
        ]
        return jnp.concatenate(moved).reshape(cotangent.shape)

    (gradient,) = jax.linear_transpose(in_one_step, image)(cotangent)
    return (gradient,)


_lay_out.defvjp(_lay_out_forward, _lay_out_backward)


def _kernel_of_windows(kernel: jax.Array) -> jax.Array:
    """The kernel for each of a window's four pixels on the patch: [blocks · 4 · in, 4 · out].

    >>> _kernel_of_windows(jnp.ones((3, 3, 1, 1))).shape
    (16, 4)
    """
    *taps, ins, outs = kernel.shape
    down, across = (tap // 2 + 1 for tap in taps)
    pads = [(1, 2 * block - tap, 0) for block, tap in zip((down, across), taps, strict=True)]
    kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), [*pads, (0, 0, 0), (0, 0, 0)])
    placed = []
    for i, j in ((1, 1), (1, 0), (0, 1), (0, 0)):
        patch = kernel[i : i + 2 * down, j : j + 2 * across]
        patch = patch.reshape(down, 2, across, 2, ins, outs).transpose(0, 2, 1, 3, 4, 5)
        placed.append(patch.reshape(-1, outs))
    return jnp.concatenate(placed, 1)
