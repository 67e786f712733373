"""Worker maps: whether a device runs its workers all at once, in turn, or in blocks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlocal.errors import ConfigurationError, unknown
from jaxlocal.parallel.collectives import vary
from jaxlocal.types import Tree

WORKER_MAPS: dict[str, int | None] = {"vmap": None, "map": 1}  # workers at once


def over_workers(fn: Callable, mode: str, in_place: int = 0) -> Callable:
    """Map a function of one worker's trees over all workers of a device.

    | mode       | how the workers run                                                        |
    |------------|----------------------------------------------------------------------------|
    | "vmap"     | all at once, as one batched program                                        |
    | "map"      | one after another in a loop, with the speed and memory of a single model   |
    | "blocks:N" | N at once, block after block                                               |

    The results are the same up to rounding.

    Args:
      fn: a function of one worker's trees, leaves [...].
      mode: "vmap", "map" or "blocks:N".
      in_place: the number of results of `fn`, from the first, that replace the arguments in the
        same positions. A loop then writes them into the arrays of the arguments, without a copy.

    Returns:
      A function of trees with leaves [d, n, ...], the workers of one device.

    Raises:
      ConfigurationError: an unknown mode, or a result that replaces an argument and differs from it
        in structure, shape or dtype.

    >>> over_workers(lambda x, batch: x + batch.sum(), "map")(jnp.ones((1, 2)), jnp.ones((1, 2, 4)))
    Array([[5., 5.]], dtype=float32)
    """
    size = block_size(mode)

    def mapped(*trees):
        d, n = jax.tree.leaves(trees)[0].shape[:2]
        flat = jax.tree.map(lambda x: x.reshape((d * n,) + x.shape[2:]), trees)

        def one(*worker):
            out = vary(fn(*worker))
            _check_replaced(worker[:in_place], out[:in_place] if in_place else ())
            return out

        if size == d * n == 1:  # without vmap, under which a cond would run both branches
            out = jax.tree.map(lambda x: x[None], one(*jax.tree.map(lambda x: x[0], flat)))
        elif size is None or size >= d * n:
            out = jax.vmap(one)(*flat)
        elif size == 1:
            step, start = _loop(fn, flat, in_place)
            (_, replaced), rest = lax.scan(step, start, flat[in_place:], length=d * n)
            out = (*replaced, *rest) if in_place else rest
        else:
            out = lax.map(lambda worker: one(*worker), flat, batch_size=size)
        return jax.tree.map(lambda x: x.reshape((d, n) + x.shape[1:]), out)

    return mapped


def block_size(mode: str) -> int | None:
    """Number of workers that a mode runs at once; None for all.

    Raises:
      ConfigurationError: an unknown mode.

    >>> block_size("map"), block_size("blocks:4"), block_size("vmap")
    (1, 4, None)
    """
    word, _, number = mode.partition(":") if isinstance(mode, str) else ("", "", "")
    if word and mode in WORKER_MAPS:
        return WORKER_MAPS[mode]
    if word != "blocks" or not number:
        raise unknown("worker map", mode, (*WORKER_MAPS, "blocks:N"))
    if not number.isdecimal() or len(number) > 9 or int(number) < 1:
        raise ConfigurationError(f"blocks:N takes a number of workers from 1 on, got {mode!r}")
    return int(number)


def _check_replaced(arguments: tuple, results: tuple) -> None:
    """Check that results have the structure, shapes and dtypes of the arguments they replace."""
    describe = lambda x: f"{jax.typeof(x).dtype}{list(jnp.shape(x))}"
    before, after = jax.tree.map(describe, arguments), jax.tree.map(describe, tuple(results))
    if before != after:
        raise ConfigurationError(f"a worker's step was given {before} and gives back {after}")


def _loop(fn: Callable, trees: tuple, in_place: int) -> tuple[Callable, tuple]:
    """The step and the carry of a loop over workers that carries the replaced trees."""

    def step(carry, rest):
        number, places = carry
        worker = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, number, 0, False), places)
        out = vary(fn(*worker, *rest))
        replaced, rest = (tuple(out[:in_place]), out[in_place:]) if in_place else ((), out)
        _check_replaced(worker, replaced)
        put = lambda x, new: lax.dynamic_update_index_in_dim(x, new, number, 0)
        return (number + 1, jax.tree.map(put, places, replaced)), rest

    return step, (0, trees[:in_place])


def has_convolution(jaxpr: Any) -> bool:
    """Whether a jaxpr has a convolution or a pooling, at any depth.

    >>> has_convolution(jax.make_jaxpr(jnp.sin)(1.0))
    False
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    names = ("conv_general_dilated", "reduce_window", "select_and_scatter")
    return any(
        eqn.primitive.name.startswith(names)
        or any(has_convolution(sub) for sub in _subjaxprs(eqn.params))
        for eqn in jaxpr.eqns
    )


def _subjaxprs(params: dict) -> list:
    values = [v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
    return [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def worker_map_for(fn: Callable, *arguments: Tree) -> str:
    """Choose the mode of `over_workers` that this backend runs fastest.

    On a CPU a loop over the workers keeps one model in the cache, and its convolutions stay plain
    ones, where vmap would make grouped convolutions of them. An accelerator is busy only with all
    workers at once, but it too is slow at the gradients of grouped convolutions.

    Args:
      fn: a function of one worker's trees.
      *arguments: one worker's trees, leaves [...]; arrays or their shapes.

    Returns:
      "map" or "vmap".

    >>> worker_map_for(jnp.sin, jax.ShapeDtypeStruct((3,), jnp.float32))  # on a CPU
    'map'
    """
    if jax.default_backend() == "cpu":
        return "map"
    return "map" if has_convolution(jax.make_jaxpr(fn)(*arguments)) else "vmap"
