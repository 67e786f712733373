"""The models in plain JAX, written by hand on the parameters of those of `jaxlocal.models`."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax

from experiments.benchmarks.workloads import Workload, scaled
from jaxlocal.types import Tree

HEADS, EPSILON = 4, 1e-6  # of the transformer, and of its normalisations


def plain_loss(workload: Workload, in_loop: bool = True) -> Callable[[Tree, Tree], jax.Array]:
    """Make `loss(params, batch)`, the mean cross-entropy of a batch of inputs and targets.

    Args:
      workload: whose model.
      in_loop: whether it runs in a compiled loop, where a CPU is slow at the weight gradients of
        `lax.conv_general_dilated`, so that convolutions are written as matrix products.
    """
    forward = MODELS[workload.model]
    if workload.model == "mll_cnn":
        forward = partial(forward, convolve=_by_windows if in_loop else _by_lax)

    def loss(params: Tree, batch: Tree) -> jax.Array:
        logits, targets = forward(params, scaled(batch["inputs"])), batch["targets"]
        if workload.outputs == 1:
            return optax.sigmoid_binary_cross_entropy(logits[:, 0], targets).mean()
        # The logit is picked by a product: a gather's gradient is a scatter, slow on a CPU.
        picked = jnp.einsum("...c,...c", logits, jax.nn.one_hot(targets, workload.outputs))
        return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()

    return loss


def _dense(layer: Tree, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _logistic(params: Tree, x: jax.Array) -> jax.Array:
    return _dense(params["map"], x.reshape(len(x), -1))


def _mlp(params: Tree, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(_dense(params["first"], x.reshape(len(x), -1)))
    return _dense(params["logits"], jax.nn.relu(_dense(params["second"], x)))


def _cnn(params: Tree, x: jax.Array, convolve: Callable) -> jax.Array:
    for name in ("first", "second"):
        x = convolve(x, params[name]["kernel"]) + params[name]["bias"]
        n, rows, columns, outs = x.shape
        x = x[:, : rows // 2 * 2, : columns // 2 * 2]
        x = jax.nn.relu(x.reshape(n, rows // 2, 2, columns // 2, 2, outs).max((2, 4)))
    x = jax.nn.relu(_dense(params["hidden"], x.reshape(len(x), -1)))
    return _dense(params["logits"], x)


def _by_lax(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _by_windows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same as one matrix product over the windows of an image."""
    height, width, ins, outs = kernel.shape
    n, rows, columns, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (height // 2,) * 2, (width // 2,) * 2, (0, 0)))
    shifts = [padded[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    windows = jnp.concatenate(shifts, -1).reshape(-1, height * width * ins)
    return (windows @ kernel.reshape(-1, outs)).reshape(n, rows, columns, outs)


def _transformer(params: Tree, tokens: jax.Array) -> jax.Array:
    x = params["tokens"][tokens] + params["positions"]
    for number in range(len(params["blocks"])):
        block = params["blocks"][str(number)]
        x = x + _attention(block["attention"], _norm(block["norm1"], x))
        x = x + _dense(block["down"], jax.nn.gelu(_dense(block["up"], _norm(block["norm2"], x))))
    return _dense(params["logits"], _norm(params["norm"], x))


def _norm(layer: Tree, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    scale = lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON)
    return x * scale * layer["scale"] + layer["bias"]


def _attention(layer: Tree, x: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    parts = jnp.split(_dense(layer["queries_keys_values"], x), 3, -1)
    queries, keys, values = (
        part.reshape(batch, length, HEADS, -1).swapaxes(1, 2) for part in parts
    )
    scores = queries @ keys.swapaxes(2, 3) / math.sqrt(width // HEADS)
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    mixed = jax.nn.softmax(scores) @ values
    return _dense(layer["out"], mixed.swapaxes(1, 2).reshape(batch, length, width))


MODELS: dict[str, Callable[..., jax.Array]] = {
    "logistic": _logistic,
    "mlp": _mlp,
    "mll_cnn": _cnn,
    "transformer": _transformer,
}
