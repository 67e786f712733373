"""How a device runs its workers: all at once, one after another, or in blocks."""

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
    """fn of one worker's trees → fn of trees with leaves [d, n, ...]; how a device runs its
    workers.

    `vmap`: all at once, as one batched program. `map`: one after another in a loop, each with the
    speed and the memory of a model of its own. `blocks:N`: N at once, block after block. The
    results are the same up to rounding.

    Args:
      in_place: how many of fn's results, the first ones, take the place of its first trees: a loop
        then writes each worker's into the array that it read them from.
    """
    size = block_size(mode)

    def mapped(*trees):
        d, n = jax.tree.leaves(trees)[0].shape[:2]
        flat = jax.tree.map(lambda x: x.reshape((d * n,) + x.shape[2:]), trees)

        def one(*worker):
            out = vary(fn(*worker))
            _check_kept(worker[:in_place], out[:in_place] if in_place else ())
            return out

        if size == d * n == 1:  # no vmap of one, under which a cond would run both of its branches
            out = jax.tree.map(lambda x: x[None], one(*jax.tree.map(lambda x: x[0], flat)))
        elif size is None or size >= d * n:
            out = jax.vmap(one)(*flat)
        elif size == 1 and in_place:
            out = _in_turn(one, flat, in_place)
        else:
            in_blocks = None if size == 1 else size
            out = lax.map(lambda worker: one(*worker), flat, batch_size=in_blocks)
        return jax.tree.map(lambda x: x.reshape((d, n) + x.shape[1:]), out)

    return mapped


def block_size(mode: str) -> int | None:
    """How many workers a mode runs at once; None for all.

    >>> block_size("map"), block_size("blocks:4"), block_size("vmap")
    (1, 4, None)
    """
    if mode in WORKER_MAPS:
        return WORKER_MAPS[mode]
    word, _, number = mode.partition(":")
    if word != "blocks" or not number:
        raise unknown("worker map", mode, (*WORKER_MAPS, "blocks:N"))
    if not number.isdecimal() or len(number) > 9 or int(number) < 1:
        raise ConfigurationError(f"blocks:N takes a number of workers from 1 on, got {mode!r}")
    return int(number)


def _check_kept(given: tuple, back: tuple) -> None:
    """What takes the place of a tree must have its structure, shapes and types."""
    told = lambda x: f"{jax.typeof(x).dtype}{list(jnp.shape(x))}"
    before, after = jax.tree.map(told, given), jax.tree.map(told, tuple(back))
    if before != after:
        raise ConfigurationError(f"a worker's step was given {before} and gives back {after}")


def _in_turn(fn: Callable, trees: tuple, in_place: int) -> tuple:
    """fn over the first dimension of its trees, one after another, the in_place ones in place."""

    def step(carry, rest):
        number, places = carry
        worker = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, number, 0, False), places)
        out = fn(*worker, *rest)
        put = lambda x, new: lax.dynamic_update_index_in_dim(x, new, number, 0)
        return (number + 1, jax.tree.map(put, places, out[:in_place])), out[in_place:]

    count = jax.tree.leaves(trees)[0].shape[0]
    (_, places), rest = lax.scan(step, (0, trees[:in_place]), trees[in_place:], length=count)
    return (*places, *rest)


def has_convolution(jaxpr: Any) -> bool:
    """Whether a jaxpr convolves or pools, at any depth."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    hot = ("conv_general_dilated", "reduce_window", "select_and_scatter")
    return any(
        eqn.primitive.name.startswith(hot)
        or any(has_convolution(sub) for sub in _subjaxprs(eqn.params))
        for eqn in jaxpr.eqns
    )


def _subjaxprs(params: dict) -> list:
    values = [v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
    return [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def worker_map_for(fn: Callable, *arguments: Tree) -> str:
    """The mode in which this backend runs `fn` fastest, for one worker's arguments (shapes are
    enough).

    On a CPU a loop over workers keeps each in cache and its convolutions plain, where vmap would
    group them. An accelerator needs all workers at once to be busy, unless a convolution would be
    grouped.
    """
    if jax.default_backend() == "cpu":
        return "map"
    return "map" if has_convolution(jax.make_jaxpr(fn)(*arguments)) else "vmap"
