"""A small convolution with its bias, relu and pooling in one: where networks for small images spend
their time.

With few channels a convolution is all memory traffic. So one matrix product gives the outputs of a
pool together, 2 x 2 pixels of all channels, from the patch of the image that they read; the pool is
the maximum of four rows of the product; and the examples of the batch come last in all of it, where
arithmetic runs along them.
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
# Measured on CPU, 3 x 3 and 5 x 5 on images of 14 x 14 to 32 x 32: with more channels the layers
# apart are as fast, since a pool's patch is larger than the kernel.
MOST_IN, MOST_OUT = 10, 64


def conv_relu_max_pool(images: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """max_pool(relu(conv(images, kernel) + bias)), with stride 1, padding "SAME", pools of 2 x 2.

    Fast on CPU, forward and backward, for few channels; with many, and off the CPU, it is the three
    layers. Values and gradients equal theirs up to the order of summation. A `jax.custom_vjp`, as
    `conv_general_dilated` is.

    Args:
      images: `[batch, height, width, in]`, sides of 2 or more; an odd last row or column is read,
        and not pooled.
      kernel: `[taps, taps, in, out]`, of the same dtype.
      bias: `[out]`, of the same dtype.

    Returns:
      `[batch, height // 2, width // 2, out]`.

    >>> images, kernel = jnp.ones((4, 28, 28, 1)), jnp.ones((5, 5, 1, 10))
    >>> conv_relu_max_pool(images, kernel, jnp.zeros(10)).shape
    (4, 14, 14, 10)
    """
    jax.eval_shape(_by_layers, images, kernel, bias)  # so that what is wrong is said as JAX says it
    return _pooled(*equally_varying(images, kernel, bias))


def pays(sides: Sequence[int], ins: int, outs: int) -> bool:
    """Whether `conv_relu_max_pool` is there for such images, and faster than the layers apart.

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


def _fast_form(images: jax.Array, kernel: jax.Array) -> Callable:
    few = pays(images.shape[1:3], *kernel.shape[2:])
    return _by_pools if few and images.size and kernel.size else _by_layers


def _forward(*operands: jax.Array) -> tuple[jax.Array, Any]:
    return _pooled(*operands), operands


def _backward(operands: Any, slope: jax.Array) -> tuple[jax.Array, ...]:
    gradients = lambda form: lambda slope, *operands: jax.vjp(form, *operands)[1](slope)
    fast = _fast_form(*operands[:2])
    return lax.platform_dependent(
        slope, *operands, cpu=gradients(fast), default=gradients(_by_layers)
    )


_pooled.defvjp(_forward, _backward)


def _by_layers(images: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    convolved = conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout)
    return max_pool(nnx.relu(convolved + bias.reshape(1, 1, 1, -1)), POOL, POOL)


def _by_pools(images: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    batch, height, width, _ = images.shape
    down, across = height // 2, width // 2
    rows = lax.dot_general(
        _of_pools(kernel), _patches(images, kernel.shape[:2]), (((0,), (0,)), ((), ()))
    )
    largest = _first_maximum(rows.reshape(4, -1, down * across * batch))
    pooled = nnx.relu(largest + bias[:, None])
    return pooled.reshape(-1, down, across, batch).transpose(3, 1, 2, 0)


@jax.custom_jvp
def _first_maximum(x: jax.Array) -> jax.Array:
    """The maximum over the first dimension; its gradient goes to the first entry that has it."""
    return functools.reduce(jnp.maximum, list(x))


@_first_maximum.defjvp
def _slope_of_first_maximum(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (slope,) = primals, tangents
    largest = _first_maximum(x)
    has_it = list(x == largest[None])
    earlier = itertools.accumulate(has_it[:-1], jnp.logical_or)
    first = jnp.stack([has_it[0], *(a & ~b for a, b in zip(has_it[1:], earlier, strict=True))])
    return largest, jnp.where(first, slope, 0).sum(0)


def _patches(images: jax.Array, taps: tuple[int, ...]) -> jax.Array:
    """What each pool reads, in blocks of 2 x 2 pixels: [blocks · 2 · 2 · in, pools · batch]."""
    batch, *sides, channels = images.shape
    pools = [side // 2 for side in sides]
    blocks = [tap // 2 + 1 for tap in taps]
    pads = [(0, 0, 0)]
    for side, pool, block, tap in zip(sides, pools, blocks, taps, strict=True):
        low = (tap - 1) // 2
        pads.append((low, 2 * (pool + block - 1) - side - low, 0))
    image = lax.pad(images.transpose(3, 1, 2, 0), jnp.zeros((), images.dtype), [*pads, (0, 0, 0)])
    down, across = (pool + block - 1 for pool, block in zip(pools, blocks, strict=True))
    image = image.reshape(channels, down, 2, across, 2, batch).transpose(2, 4, 0, 1, 3, 5)
    image = image.reshape(4 * channels, down, across, batch)
    moved = [
        image[:, i : i + pools[0], j : j + pools[1]].reshape(4 * channels, -1)
        for i in range(blocks[0])
        for j in range(blocks[1])
    ]
    return jnp.concatenate(moved)


def _of_pools(kernel: jax.Array) -> jax.Array:
    """The kernel at each of a pool's four pixels, on its patch: [blocks · 2 · 2 · in, 2 · 2 · out].

    >>> _of_pools(jnp.ones((3, 3, 1, 1))).shape
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
