"""The time of a round's arithmetic alone: its floating-point operations at the rate of a matrix
product."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.speed.in_jax import plain_loss
from experiments.benchmarks.speed.workloads import (
    Workload,
    example_shapes,
    initial_params,
    make_indices,
)
from jaxlocal.types import Tree

SIZES = {"cpu": (1024, 1536, 2048), "gpu": (4096, 8192)}  # of square matrices
TRIES = 2


def count_flops(jaxpr: Any) -> int:
    """The floating-point operations of the matrix products and convolutions of a jaxpr.

    Convolutions over zeros that are set between the pixels of their input count without these;
    loops count as often as they run, of branches the longest.

    >>> product = jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 5)))
    >>> count_flops(product)
    60
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(map(_flops_of, jaxpr.eqns))


def _flops_of(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * eqn.outvars[0].aval.size * _product(eqn.invars[0].aval.shape, contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        of_output = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        total = 2 * eqn.outvars[0].aval.size * of_output
        return total // math.prod(params["lhs_dilation"])
    inner = [count_flops(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise ValueError("products in a loop whose length is not known cannot be counted")
    return sum(inner) * params.get("length", 1)


def _product(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return math.prod(shape[axis] for axis in axes)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                yield part


def round_flops(workload: Workload) -> int:
    """The operations of all gradients of a round, written with plain layers."""
    pool = example_shapes(workload, (workload.examples,))
    gradient = jax.value_and_grad(plain_loss(workload))
    index = make_indices(workload, 0)[0, 0]
    jaxpr = jax.make_jaxpr(gradient)(initial_params(workload), pool, index)
    return count_flops(jaxpr) * workload.workers * workload.steps


def bound(workload: Workload) -> Callable[[], float]:
    """A measurement of the rate of a matrix product, as the seconds of a round at that rate."""
    flops = round_flops(workload)
    sizes = SIZES["cpu" if jax.default_backend() == "cpu" else "gpu"]
    product = jax.jit(jnp.matmul)
    pairs = {n: (jnp.ones((n, n)), jnp.ones((n, n))) for n in sizes}

    def seconds(pair: Tree) -> float:
        start = time.perf_counter()
        jax.block_until_ready(product(*pair))
        return time.perf_counter() - start

    def measure() -> float:
        tries = [(n, seconds(pair)) for n, pair in pairs.items() for _ in range(TRIES)]
        return flops / max(2 * n**3 / taken for n, taken in tries)

    measure()
    return measure
