"""Initialize a model as one program that compiles quickly, since it runs once."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# The code is slower by milliseconds, and gives the same numbers: the level of LLVM's optimisations
# does not change XLA's own. Level 0 would round some of them otherwise.
_QUICKLY = {"xla_backend_optimization_level": 1}


def compiled_init(init: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Compile the initialization of a model, which would else compile each of its operations.

    Args:
      init: `init(key)`, a function that can be traced.

    Returns:
      The same function. Shapes (`jax.eval_shape`) and values share one trace.

    >>> init = compiled_init(lambda key: jax.random.normal(key, (2,)))
    >>> jax.eval_shape(init, jax.random.key(0)).shape, init(jax.random.key(0)).shape
    ((2,), (2,))
    """
    traced = jax.jit(init)
    at_once = jax.jit(init, compiler_options=_QUICKLY)

    @functools.wraps(init)
    def run(key: jax.Array) -> Any:
        inside = isinstance(key, jax.core.Tracer)  # JAX takes options in outermost programs only
        on_cpu = jax.default_backend() == "cpu"  # whose options they are
        return at_once(key) if on_cpu and not inside else traced(key)

    return run
