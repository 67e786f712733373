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
MOST_IN, MOST_OUT = 10, 64


def conv_relu_max_pool(images: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Convolution, bias, relu and max-pooling of 2 x 2 as one layer, which is fast on CPU.

    It computes max_pool(relu(conv(images, kernel) + bias)) with stride 1 and padding "SAME". The
    fast form is for at most 10 input and 64 output channels; with more, and on other backends than
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
    down, across = height // 2, width // 2
    rows = lax.dot_general(
        _kernel_of_windows(kernel), _patches(images, kernel.shape[:2]), (((0,), (0,)), ((), ()))
    )
    largest = _first_maximum(rows.reshape(4, -1, down * across * batch))
    pooled = nnx.relu(largest + bias[:, None])
    return pooled.reshape(-1, down, across, batch).transpose(3, 1, 2, 0)


@jax.custom_jvp
def _first_maximum(x: jax.Array) -> jax.Array:
    """The maximum over the first dimension; of equal entries, the first gets the gradient."""
    return functools.reduce(jnp.maximum, list(x))


@_first_maximum.defjvp
def _first_maximum_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    largest = _first_maximum(x)
    equal = list(x == largest[None])
    earlier = itertools.accumulate(equal[:-1], jnp.logical_or)
    first = jnp.stack([equal[0], *(a & ~b for a, b in zip(equal[1:], earlier, strict=True))])
    return largest, jnp.where(first, tangent, 0).sum(0)


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
    image = image.reshape(4 * channels, down, across, batch)
    moved = [
        image[:, i : i + windows[0], j : j + windows[1]].reshape(4 * channels, -1)
        for i in range(blocks[0])
        for j in range(blocks[1])
    ]
    return jnp.concatenate(moved)


def _kernel_of_windows(kernel: jax.Array) -> jax.Array:
    """The kernel for each of a window's four pixels on the patch: [blocks · 4 · in, 4 · out].

    >>> _kernel_of_windows(jnp.ones((3, 3, 1, 1))).shape
    (16, 4)
    """
    *taps, ins, outs = kernel.shape
    blocks = [tap // 2 + 1 for tap in taps]
    zero = jnp.zeros((), kernel.dtype)
    placed = []
    for at in ((0, 0), (0, 1), (1, 0), (1, 1)):
        room = zip(at, blocks, taps, strict=True)
        pads = [(first, 2 * block - tap - first, 0) for first, block, tap in room]
        placed.append(lax.pad(kernel, zero, [*pads, (0, 0, 0), (0, 0, 0)]))
    patch = jnp.stack(placed, 3).reshape(blocks[0], 2, blocks[1], 2, ins, 4 * outs)
    return patch.transpose(0, 2, 1, 3, 4, 5).reshape(-1, 4 * outs)
