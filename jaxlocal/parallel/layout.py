"""The layout of workers: the grid of hubs × workers, with their weights and rates."""

import dataclasses
import numbers
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxlocal.errors import ConfigurationError, check_integer
from jaxlocal.types import Context, Tree

# The mesh axes: two over which the grid of workers is sharded, and one that shards each worker.
AXES, MODEL = ("hubs", "workers"), "model"

# How leaves lie on a mesh: [D, N, ...] for all workers, [...] the same everywhere, and a Context.
STACKED, SINGLE = P(*AXES), P()
CONTEXT = Context(STACKED, STACKED, STACKED, STACKED, SINGLE)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Layout of K = D · N workers: D hubs of N workers each, with their weights and rates.

    Args:
      hubs: D, the number of hubs; 1 for a method without hubs.
      workers_per_hub: N, the number of workers of each hub.
      weights: w_i > 0, one number, N (the same in each hub), K, or any shape that broadcasts to
        [D, N]. The share of worker i in the average is a_i = w_i / Σ w.
      rates: p_i in (0, 1], in the same shapes: the probability that worker i takes a local step.

    Raises:
      ConfigurationError: no hubs or no workers, numbers that do not fit the grid, a weight or rate
        out of its range, or weights so different that float32 cannot hold the smallest share.

    >>> Layout(hubs=2, workers_per_hub=2, weights=[1, 1, 2, 4]).weight
    array([[0.125, 0.125],
           [0.25 , 0.5  ]])
    """

    hubs: int = 1
    workers_per_hub: int = 1
    weights: Any = 1.0
    rates: Any = 1.0

    def __post_init__(self):
        for name in ("hubs", "workers_per_hub"):
            check_integer(name, getattr(self, name))
        weights, rates = self._grid("weights"), self._grid("rates")
        for wrong in weights[~((weights > 0) & np.isfinite(weights))][:1]:
            raise ConfigurationError(f"worker weights must be > 0 and finite, got {wrong}")
        for wrong in rates[~((rates > 0) & (rates <= 1))][:1]:
            raise ConfigurationError(f"worker rates must be in (0, 1], got {wrong}")
        if rates.min() < np.finfo(np.float32).tiny:
            raise ConfigurationError(f"a worker rate of {rates.min()} is 0 in float32")
        if (self.weight < np.finfo(np.float32).tiny).any():
            raise ConfigurationError(
                f"worker weights from {weights.min()} to {weights.max()} are too far apart for "
                f"float32"
            )

    def _grid(self, field: str) -> np.ndarray:
        """The weights or rates as float64 [D, N]."""
        values = real_numbers(f"worker {field}", getattr(self, field))
        if values.ndim == 1 and values.size == self.workers:
            values = values.reshape(self.shape)
        try:
            return np.broadcast_to(values, self.shape)
        except ValueError:
            raise ConfigurationError(
                f"{values.size} {field} do not fit {self.hubs} hubs × {self.workers_per_hub} "
                f"workers: give one, {self.workers_per_hub} (a hub's) or {self.workers}"
            ) from None

    @property
    def shape(self) -> tuple[int, int]:
        """(D, N)."""
        return self.hubs, self.workers_per_hub

    @property
    def workers(self) -> int:
        """K, the number of workers."""
        return self.hubs * self.workers_per_hub

    @property
    def weight(self) -> np.ndarray:
        """a_i, the share of each worker in the average, float64 [D, N]; sums to 1."""
        weights = self._grid("weights") / self._grid("weights").max()  # their sum cannot overflow
        return weights / weights.sum()

    @property
    def hub_weight(self) -> np.ndarray:
        """b_d = Σ a_i over the workers of hub d, float64 [D]; sums to 1."""
        return self.weight.sum(axis=1)

    @property
    def rate(self) -> np.ndarray:
        """p_i, the probability that each worker takes a local step, float64 [D, N]."""
        return self._grid("rates")

    def context(self, data: Tree = ()) -> Context:
        """Build the context of rounds on this layout: what is fixed besides the state.

        Args:
          data: a pool of examples that batches of indices point into, leaves [examples, ...].

        Returns:
          A Context of host arrays [D, N].
        """
        return Context(
            worker=np.arange(self.workers, dtype=np.int32).reshape(self.shape),
            weight=self.weight,
            hub_share=self.weight / self.hub_weight[:, None],
            rate=None if (self.rate == 1).all() else self.rate,
            data=data,
        )


def real_numbers(what: str, given: Any) -> np.ndarray:
    """Numbers that a user gives, as float64.

    >>> real_numbers("weights", "abc")
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: weights must be real numbers, got 'abc'
    """
    try:
        values = np.asarray(given)
    except ValueError:  # lists of different lengths
        values = np.asarray(None)
    real = any(jax.dtypes.issubdtype(values.dtype, kind) for kind in (np.integer, np.floating))
    if not real and not all(isinstance(x, numbers.Real) for x in values.astype(object).flat):
        raise ConfigurationError(f"{what} must be real numbers, got {given!r}")
    return values.astype(np.float64)
