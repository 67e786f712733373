"""The methods whose costs are measured."""

from collections.abc import Callable

import optax

import jaxlocal
from jaxlocal.compression import parse
from jaxlocal.types import Method


def measured_methods(
    grad_fn: Callable, optimizer: optax.GradientTransformation, steps: int
) -> dict[str, Method]:
    """Build the measured methods, with and without compressed messages, by name.

    Args:
      grad_fn: gradient of one worker, as `jaxlocal.gradients` makes it.
      optimizer: optimizer of every worker.
      steps: H, local steps of a round.
    """
    gradient, reset = parse("grbs:64"), parse("grbs:4")
    return {
        "local_sgd": jaxlocal.local_sgd(grad_fn, optimizer, period=steps),
        "data_parallel": jaxlocal.data_parallel(grad_fn, optimizer),
        "cser": jaxlocal.cser(
            grad_fn,
            optimizer,
            gradient_compressor=gradient,
            reset_compressor=reset,
            period=steps,
        ),
        "qsparse_local_sgd": jaxlocal.qsparse_local_sgd(
            grad_fn, optimizer, compressor=reset, period=steps
        ),
        "ef_sgd": jaxlocal.ef_sgd(grad_fn, optimizer, compressor=gradient),
    }
