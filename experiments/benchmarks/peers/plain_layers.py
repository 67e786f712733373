"""The models in plain JAX, written by hand on the parameters of those of `jaxlocal.models`."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from experiments.benchmarks.workloads import Workload, scaled
from jaxlocal.types import Tree

HEADS, EPSILON = 4, 1e-6  # of the transformer, and of its normalisations


def plain_loss(workload: Workload) -> Callable[[Tree, Tree], jax.Array]:
    """Make `loss(params, batch)`, the mean cross-entropy of a batch of inputs and targets."""
    forward = MODELS[workload.model]

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


def _cnn(params: Tree, x: jax.Array) -> jax.Array:
    x = _convolved(params["first"], x)
    x = _convolved(params["second"], x)
    x = jax.nn.relu(_dense(params["hidden"], x.reshape(len(x), -1)))
    return _dense(params["logits"], x)


def _convolved(layer: Tree, x: jax.Array) -> jax.Array:
    """A convolution as one matrix product over its windows, relu, and pooling by 2.

    In a loop on a CPU the weight gradient of `lax.conv` is many times slower.
    """
    kernel = layer["kernel"]
    height, width, ins, outs = kernel.shape
    n, rows, columns, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (height // 2,) * 2, (width // 2,) * 2, (0, 0)))
    shifts = [padded[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    windows = jnp.concatenate(shifts, -1).reshape(-1, height * width * ins)
    x = (windows @ kernel.reshape(-1, outs) + layer["bias"]).reshape(n, rows, columns, outs)
    x = x[:, : rows // 2 * 2, : columns // 2 * 2]
    return jax.nn.relu(x.reshape(n, rows // 2, 2, columns // 2, 2, outs).max((2, 4)))


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


MODELS: dict[str, Callable[[Tree, jax.Array], jax.Array]] = {
    "logistic": _logistic,
    "mlp": _mlp,
    "mll_cnn": _cnn,
    "transformer": _transformer,
}
