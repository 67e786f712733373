"""Partitions of the examples among the workers.

| spec | partition |
|---|---|
| `iid` | all examples are shuffled for each epoch and dealt in equal disjoint parts |
| `fresh` | every batch is drawn uniformly from all examples, with replacement |
| `reused:STEPS` | every STEPS steps, each worker draws 1/workers of all, and passes over them |
| `sorted`, `sorted:OFFSET` | examples are sorted by label; each worker holds a contiguous shard |
| `by_distance` | the same, sorted by the signed distance to the dataset's hyperplane |
| `unequal`, `unequal:F1,F2,...` | groups of workers hold these fractions of shuffled examples |
| `dirichlet`, `dirichlet:ALPHA` | each class is dealt by shares drawn from a Dirichlet |

Under the last four, each worker holds a fixed shard for the whole run.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data.checks import check_name, check_whole, labels_of
from jaxlocal.data.shards import (
    check_enough,
    dirichlet_shards,
    sorted_shards,
    sorted_sizes,
    unequal_shards,
    unequal_sizes,
)
from jaxlocal.errors import ConfigurationError, unknown

PARTITIONS = ("iid", "fresh", "reused", "sorted", "by_distance", "unequal", "dirichlet")
UNEQUAL_FRACTIONS = (0.05, 0.1, 0.2, 0.25, 0.4)  # those of the code released with MLL-SGD


class Partition(NamedTuple):
    """A parsed spec of a partition."""

    kind: str  # one of PARTITIONS
    offset: float = 0.0  # sorted: rotation, in shards
    fractions: tuple[float, ...] = ()  # unequal: of the examples, one for each group of workers
    alpha: float = 0.0  # dirichlet: concentration
    steps: int = 0  # reused: between two draws

    @property
    def fixed(self) -> bool:
        """Whether a worker keeps the same examples over the whole run."""
        return self.kind in ("sorted", "by_distance", "unequal", "dirichlet")

    @property
    def sorts(self) -> bool:
        """Whether the shards depend on the values of the targets, or on distances."""
        return self.kind in ("sorted", "by_distance", "dirichlet")

    @property
    def labelled(self) -> bool:
        """Whether the sizes of the shards depend on the labels."""
        return self.kind == "dirichlet"


def parse_partition(spec: str) -> Partition:
    """Parse the spec of a partition, such as "dirichlet:0.3".

    Args:
      spec: see `jaxlocal.data.partitions`.

    Returns:
      The partition.

    Raises:
      ConfigurationError: the kind is unknown, the offset is outside [0, 1), the fractions are not
        positive or do not sum to 1 within 1e-6, alpha is outside [1e-6, 1e6], or the steps of
        `reused` are not 1 to 2^31 - 1.

    >>> parse_partition("sorted:0.5").offset
    0.5
    >>> parse_partition("unequal:0.25,0.75").fractions
    (0.25, 0.75)
    >>> parse_partition("dirichlet").alpha
    0.5
    """
    check_name("a partition", spec)
    kind, colon, argument = spec.partition(":")
    if kind not in PARTITIONS:
        raise unknown("partition", kind, PARTITIONS)
    if kind == "sorted":
        return Partition(kind, offset=_offset(spec, argument) if colon else 0.0)
    if kind == "unequal":
        fractions = _fractions(spec, argument) if colon else UNEQUAL_FRACTIONS
        return Partition(kind, fractions=fractions)
    if kind == "dirichlet":
        return Partition(kind, alpha=_alpha(spec, argument) if colon else 0.5)
    if kind == "reused":
        return Partition(kind, steps=_steps(spec, argument))
    if colon:
        raise ConfigurationError(f"partition {kind!r} takes no argument, got {spec!r}")
    return Partition(kind)


def shard_sizes(partition: Partition, examples: int, workers: int) -> NDArray[np.int64]:
    """Number of examples that each worker holds, without reading any example.

    Under `iid`, the number is that of an epoch; under `reused`, that of a draw; under `fresh`, each
    worker holds all examples.

    Args:
      partition: the partition.
      examples: number of examples.
      workers: number of workers in all hubs.

    Returns:
      int64 [workers].

    Raises:
      ConfigurationError: a worker would hold no example, the groups do not divide the workers, or
        the sizes depend on the labels.

    >>> shard_sizes(parse_partition("unequal:0.25,0.75"), examples=80, workers=4)
    array([10, 10, 30, 30])
    """
    if partition.labelled:
        raise ConfigurationError(
            f"the size of a shard under partition {partition.kind!r} depends on the labels of the "
            f"{examples} examples, and only their number is given"
        )
    if partition.kind == "fresh":
        return np.full(workers, examples)
    check_enough(examples, workers)
    if partition.kind in ("iid", "reused"):
        return np.full(workers, examples // workers)
    if partition.kind in ("sorted", "by_distance"):
        return sorted_sizes(examples, workers)
    return unequal_sizes(partition.fractions, examples, workers)


def assign(
    partition: Partition, targets: NDArray[Any], workers: int, seed: int, least: int = 1
) -> list[NDArray[np.int32]]:
    """Assign every example to exactly one worker, for the whole run.

    Args:
      partition: one with fixed shards.
      targets: [examples], the labels; for `by_distance` the distances. `sorted` takes any values
        that can be sorted.
      workers: number of workers in all hubs.
      seed: the seed of `unequal` and `dirichlet`; the others use none.
      least: number of examples that a worker needs at least, such as a batch; `dirichlet` draws
        again until each worker holds them, and the other kinds ignore it.

    Returns:
      An array of example numbers for each worker, int32 [shard size].

    Raises:
      ConfigurationError: the partition has no fixed shards, there is not one label for each
        example, or the examples are too few.

    >>> for shard in assign(parse_partition("sorted"), np.array([1, 0, 1, 0]), workers=2, seed=0):
    ...     print(shard)
    [1 3]
    [0 2]
    """
    check_whole(1, workers=workers)
    check_whole(0, seed=seed)
    targets = labels_of(targets)
    if not partition.fixed:
        raise ConfigurationError(f"partition {partition.kind!r} gives no worker a fixed shard")
    if partition.kind == "unequal":
        return unequal_shards(len(targets), workers, partition.fractions, seed)
    if targets.ndim != 1:
        raise ConfigurationError(
            f"partition {partition.kind!r} needs one label for each example, and the targets have "
            f"the shape {list(targets.shape)}"
        )
    if partition.kind in ("sorted", "by_distance"):
        return sorted_shards(targets, workers, partition.offset)
    return dirichlet_shards(targets, workers, partition.alpha, seed, least)


def _offset(spec: str, text: str) -> float:
    offset = _number(spec, text)
    if not 0.0 <= offset < 1.0:
        raise ConfigurationError(
            f"the offset in partition {spec!r} must be at least 0 and below 1 shard, got {offset}"
        )
    return offset


def _fractions(spec: str, text: str) -> tuple[float, ...]:
    fractions = tuple(_number(spec, part) for part in text.split(","))
    if not all(fraction > 0 for fraction in fractions):
        raise ConfigurationError(f"the fractions in partition {spec!r} must all be positive")
    total = sum(fractions)
    if not abs(total - 1.0) <= 1e-6:
        raise ConfigurationError(
            f"the fractions in partition {spec!r} must sum to 1, they sum to {total:.7g}"
        )
    return fractions


def _alpha(spec: str, text: str) -> float:
    alpha = _number(spec, text)
    if not 1e-6 <= alpha <= 1e6:  # beyond these bounds, the draws lose precision
        raise ConfigurationError(
            f"the alpha in partition {spec!r} must be from 1e-6 to 1e6, got {alpha}"
        )
    return alpha


def _steps(spec: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise ConfigurationError(
            "partition 'reused' needs the number of steps between two draws, from 1 to 2^31 - 1, "
            f"such as reused:16; got {spec!r}"
        )
    return int(text)


def _number(spec: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"{text!r} in partition {spec!r} is not a number") from None
