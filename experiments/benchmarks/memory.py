"""Count the peak memory of compiled programs."""

from collections.abc import Callable
from typing import Any

import jax


def peak_bytes(fn: Callable, *shapes: Any, donate: tuple[int, ...] = ()) -> int:
    """Peak memory of a function on one device, as the compiler states it.

    Arguments, results that do not reuse the memory of a donated argument, and temporary buffers
    count.

    Args:
      fn: the function, which is compiled but not run.
      shapes: its arguments, as arrays or their shapes.
      donate: numbers of the arguments whose memory the results may reuse.

    Returns:
      Bytes.

    >>> x = jax.ShapeDtypeStruct((1000,), "float32")
    >>> peak_bytes(lambda x: x + 1, x), peak_bytes(lambda x: x + 1, x, donate=(0,))
    (8000, 4000)
    """
    compiled = jax.jit(fn, donate_argnums=donate).lower(*shapes).compile()
    sizes: Any = compiled.memory_analysis()
    return (
        sizes.temp_size_in_bytes
        + sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
    )
