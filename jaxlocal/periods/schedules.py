"""Learning-rate schedules as the host reads them: exact, and looked ahead of."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.leaves import describe, dtype_of

_BLOCK = 4096  # steps of a schedule that are evaluated at once
_AHEAD = 256  # blocks, about a million steps, that are searched for the end of a rise or the next


class Rates:
    """A schedule on the host, in float64 and many steps at once.

    In float32 a rate of 0.1 is a little more than 0.1, and ⌊(0.2/η)²⌋ would be 3.

    Args:
      learning_rate: η by step, or a number.

    >>> warm = Rates(optax.warmup_cosine_decay_schedule(0.0, 0.5, 10, 100))
    >>> warm(0), warm(5), warm.peak(0), warm.peak(5), warm.first_above(0.25, 0, 100)
    (0.0, 0.25, 0.5, 0.5, 0)
    """

    def __init__(self, learning_rate: optax.ScalarOrSchedule) -> None:
        check_rate(learning_rate)
        self._number = None if callable(learning_rate) else float(learning_rate)
        self._many = jax.jit(jax.vmap(lambda step: _number(learning_rate(step))))
        self._block = functools.cache(self._evaluated)
        self._peaks = functools.cache(self._peaks_of)

    def __call__(self, step: int) -> float:
        """η at a step."""
        if self._number is not None:
            return self._number
        return float(self._block(step // _BLOCK)[step % _BLOCK])

    def peak(self, step: int) -> float:
        """η at the step from which on it next falls: of a step of a warm-up, the rate at its end,
        and of a step after which the rate falls, its own rate."""
        if self._number is not None:
            return self._number
        return float(self._peaks(step // _BLOCK)[step % _BLOCK])

    def first_above(self, rate: float, start: int, stop: int) -> int | None:
        """The first of the steps from start to stop − 1 whose peak is more than a rate."""
        if self._number is not None:
            return start if self._number > rate and start < stop else None
        first = start // _BLOCK
        for block in range(first, min(-(-stop // _BLOCK), first + _AHEAD)):
            above = np.flatnonzero(self._peaks(block) > rate) + block * _BLOCK
            above = above[(above >= start) & (above < stop)]
            if above.size:
                return int(above[0])
        return None

    def _evaluated(self, block: int) -> np.ndarray:
        cpu = jax.local_devices(backend="cpu")[0]
        # A schedule that keeps to strict promotion in float32 need not do so in float64.
        standard = jax.numpy_dtype_promotion("standard")
        steps = np.arange(_BLOCK, dtype=np.int64) + block * _BLOCK
        try:
            with jax.enable_x64(True), jax.default_device(cpu), standard:
                return np.asarray(self._many(steps))
        except jax.errors.JAXTypeError as error:  # it branches on the step, for instance
            raise ConfigurationError(
                "a schedule must be a function of the step that jax.jit can compile, as those of "
                f"optax are, with jnp.where for if: {str(error).splitlines()[0]}"
            ) from error

    def _peaks_of(self, block: int) -> np.ndarray:
        """The peaks of all steps of a block."""
        rates = self._block(block)
        falls = np.append(~(rates[1:] >= rates[:-1]), True)
        ends = np.flatnonzero(falls)[np.searchsorted(np.flatnonzero(falls), np.arange(_BLOCK))]
        peaks = rates[ends]
        peaks[ends == _BLOCK - 1] = self._end_of_rise(block)
        return peaks

    def _end_of_rise(self, block: int) -> float:
        """The peak of the last step of a block."""
        last = self._block(block)[-1]
        for following in range(block + 1, block + _AHEAD):
            rates = self._block(following)
            falls = np.flatnonzero(~(rates >= np.append(last, rates[:-1])))
            if falls.size:
                return rates[falls[0] - 1] if falls[0] else last
            last = rates[-1]
        return last


def check_rate(learning_rate: Any) -> None:
    """Raise ConfigurationError where this is neither a number nor a function of the step.

    >>> check_rate("0.1")
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: a learning rate must be a number or a function of the step,
    got '0.1'
    """
    takes_a_step = callable(learning_rate)
    if takes_a_step:
        try:
            inspect.signature(learning_rate).bind(0)
        except TypeError:
            takes_a_step = False
        except ValueError:  # no signature, as some functions written in C
            pass
    if not takes_a_step and not is_real(learning_rate):
        raise ConfigurationError(
            f"a learning rate must be a number or a function of the step, got {learning_rate!r}"
        )


def _number(rate: Any) -> jax.Array:
    """What a schedule gives at a step, float64 []."""
    if not is_real(rate):
        raise ConfigurationError(f"a schedule must give a number at a step, got {describe(rate)}")
    return jnp.asarray(rate, jnp.float64)


def is_real(x: Any) -> bool:
    """Whether something is one real number, or an array of JAX that holds one.

    >>> is_real(0.1), is_real(jnp.int32(3)), is_real("0.1"), is_real(True), is_real(np.ones(2))
    (True, True, False, False, False)
    """
    dtype = dtype_of(x)
    real = dtype is not None and jnp.issubdtype(dtype, np.number)
    return real and not jnp.issubdtype(dtype, np.complexfloating) and jnp.shape(x) == ()


def rates(learning_rate: optax.ScalarOrSchedule) -> Rates:
    """Evaluate a schedule on the host, in float64 and many steps at once.

    Args:
      learning_rate: η by step, or a number.

    Returns:
      A function from a step to η, a Python float.

    >>> rates(lambda step: 0.1 / (1 + step))(1)
    0.05
    """
    return Rates(learning_rate)
