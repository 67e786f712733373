"""Layers of networks for images in float64 NumPy, from their equations, and a model's sizes."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxlocal
from jaxlocal.models.supervised import training_loss


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def drawn(shapes, seed=0):
    """Arrays of these shapes, drawn by NumPy, since JAX's draws take long to compile.

    Kernels keep the size of what they are applied to; vectors, variances among them, are positive.
    """
    random = np.random.default_rng(seed)

    def one(leaf):
        if len(leaf.shape) == 1:
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        ins = leaf.size / leaf.shape[-1]
        return (random.normal(size=leaf.shape) / np.sqrt(ins)).astype(np.float32)

    return jax.tree.map(one, shapes)


def images(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def relu(x):
    return np.maximum(x, 0)


def dense(x, layer):
    return x @ layer["kernel"] + layer.get("bias", 0)


def _windows(x, side, stride, low, fill):
    """What each entry of a window sees, padded by `low` on all sides: [side², batch, rows, …]."""
    padded = np.pad(x, ((0, 0), (low, low), (low, low), (0, 0)), constant_values=fill)
    rows = (padded.shape[1] - side) // stride + 1
    columns = (padded.shape[2] - side) // stride + 1
    return np.stack(
        [
            padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride][
                :, :rows, :columns
            ]
            for i in range(side)
            for j in range(side)
        ]
    )


def convolve(x, kernel, stride=1):
    """Convolution by a kernel of an odd side, padded by half of it."""
    side, _, ins, outs = kernel.shape
    seen = _windows(x, side, stride, side // 2, 0.0)
    return sum(view @ tap for view, tap in zip(seen, kernel.reshape(-1, ins, outs), strict=True))


def max_pool(x, side, stride, low=0):
    return _windows(x, side, stride, low, -np.inf).max(0)


def two_steps(model, shape, classes, worker_map):
    """The state after two steps of two workers by SGD, and a start that JAX draws."""
    import optax

    params, model_state = jax.jit(model.init)(jax.random.key(3))
    batches = {
        "inputs": images(2, 1, 2, 4, *shape),
        "targets": np.arange(16, dtype=np.int32).reshape(2, 1, 2, 4) % classes,
    }
    grad_fn = jaxlocal.gradients(training_loss(model, jnp.asarray, classes), stateful=True)
    method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.05), period=2, worker_map=worker_map)
    round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
    state, _ = round_fn(round_fn.init(params, jax.random.key(0), model_state), batches)
    return params, state
