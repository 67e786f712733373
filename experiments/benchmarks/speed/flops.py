"""Count the floating-point operations of a round, and time them at the rate of a matrix product."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.speed.jax_contenders import plain_loss
from experiments.benchmarks.workloads import Workload, example_shapes, make_indices, param_shapes
from jaxlocal.types import Tree

SIZES = {"cpu": (1024, 1536, 2048), "gpu": (4096, 8192)}  # rows of the square matrices
TRIES = 2  # products of each size


def count_flops(jaxpr: Any) -> int:
    """Count the floating-point operations of the matrix products and convolutions of a jaxpr.

    The zeros that a dilated convolution inserts between the pixels of its input do not count. The
    body of a loop counts once per iteration, and of a conditional the largest branch counts.

    Args:
      jaxpr: as `jax.make_jaxpr` returns it.

    Raises:
      ValueError: products run in a loop whose number of iterations is unknown.

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
        per_output = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        total = 2 * eqn.outvars[0].aval.size * per_output
        return total // math.prod(params["lhs_dilation"])
    inner = [count_flops(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise ValueError("cannot count products in a loop: its number of iterations is unknown")
    return sum(inner) * params.get("length", 1)


def _product(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return math.prod(shape[axis] for axis in axes)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                yield part


def round_flops(workload: Workload) -> int:
    """Count the floating-point operations of all gradients of a round, written in plain layers."""
    pool = example_shapes(workload, (workload.examples,))
    gradient = jax.value_and_grad(plain_loss(workload))
    index = make_indices(workload, 0)[0, 0]
    jaxpr = jax.make_jaxpr(gradient)(param_shapes(workload), pool, index)
    return count_flops(jaxpr) * workload.workers * workload.steps


def flops_timer(workload: Workload) -> Callable[[], float]:
    """Make a function that times matrix products and returns the seconds of a round at their rate.

    No implementation of the round is faster than its operations at that rate.
    """
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
