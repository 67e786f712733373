"""Variables of NNX that are quick to replace inside a transformation.

`variable[...] = value` of Flax compares shardings, which traced arrays do not have. JAX makes the
message of that error from all that has been traced before: in a network of 150 layers these
messages take longer than the trace itself.
"""

from typing import Any

from flax import nnx


class _Quick(nnx.Variable):
    """Before a class of variables: a value of the same shape and dtype takes the place of the old
    one without a comparison."""

    def __setitem__(self, key: Any, value: Any) -> None:
        old = self.get_value()
        if key is ... and (value.shape, value.dtype) == (old.shape, old.dtype):
            self.set_value(value)
        else:
            super().__setitem__(key, value)


class Statistic(_Quick, nnx.BatchStat):
    """A running statistic."""


class Count(_Quick, nnx.RngCount):
    """How often a random stream was drawn from."""


def quick_rngs(key: Any) -> nnx.Rngs:
    """`nnx.Rngs(key)` whose stream counts quickly what is drawn from it.

    >>> import jax
    >>> rngs = quick_rngs(jax.random.key(0))
    >>> bool(rngs.params() == nnx.Rngs(jax.random.key(0)).params()), int(rngs.default.count[...])
    (True, 1)
    """
    rngs = nnx.Rngs(key)
    stream = rngs.default
    stream.count = Count(stream.count.get_value(), tag=stream.tag)
    return rngs
