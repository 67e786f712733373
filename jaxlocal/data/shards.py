"""Shards: the example numbers that each worker holds, by label, by fractions, or by Dirichlet."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data import seeds
from jaxlocal.errors import ConfigurationError

_DRAWS = 1000  # largest number of draws of a Dirichlet partition


def sorted_shards(
    targets: NDArray[Any], workers: int, offset: float = 0.0
) -> list[NDArray[np.int32]]:
    """Partition by label: contiguous shards of the examples in the order of their labels.

    The sort is stable, and the order is circular: the first shard starts `offset` shards after its
    start. With 20 workers on CIFAR-10, an offset of 0 gives each worker examples of one label; 0.5
    gives ten workers examples of one label and ten workers examples of two. Sizes differ by one at
    most.

    Args:
      targets: [examples], values that can be sorted.
      workers: number of workers.
      offset: rotation in shards, in [0, 1).

    Returns:
      An array of example numbers for each worker.

    >>> [shard.tolist() for shard in sorted_shards(np.array([1, 0, 1, 0]), workers=2)]
    [[1, 3], [0, 2]]

    Reference: Qin, Etesami, Uribe, "Faster Convergence of Local SGD for Over-Parameterized Models",
    TMLR 2024, https://arxiv.org/abs/2201.12719
    """
    sizes = sorted_sizes(len(targets), workers)
    order = np.argsort(targets, kind="stable").astype(np.int32)
    return _deal(np.roll(order, -round(offset * len(targets) / workers)), sizes)


def unequal_shards(
    examples: int, workers: int, fractions: tuple[float, ...], seed: int
) -> list[NDArray[np.int32]]:
    """Partition by unequal fractions: equal groups of workers hold fractions of the examples.

    The examples are shuffled. Consecutive groups of workers hold the given fractions of them, and
    the workers of a group hold equal parts; their sizes differ by one at most.

    Args:
      examples: number of examples.
      workers: number of workers, a multiple of the number of fractions.
      fractions: one for each group; they sum to 1.
      seed: the seed of the shuffle.

    Returns:
      An array of example numbers for each worker.

    >>> [len(shard) for shard in unequal_shards(80, 4, (0.25, 0.75), seed=0)]
    [10, 10, 30, 30]

    Reference: Castiglia, Das, Patterson, "Multi-Level Local SGD: Distributed SGD for Heterogeneous
    Hierarchical Networks", ICLR 2021, https://arxiv.org/abs/2007.13819 (100 workers in five groups)
    """
    sizes = unequal_sizes(fractions, examples, workers)
    order = np.random.default_rng((seed, seeds.ASSIGNMENT)).permutation(examples).astype(np.int32)
    return _deal(order, sizes)


def dirichlet_shards(
    targets: NDArray[Any], workers: int, alpha: float, seed: int, least: int = 1
) -> list[NDArray[np.int32]]:
    """Partition with label skew: each class is dealt to the workers by shares from a Dirichlet.

        for each class:  shares over workers ~ Dirichlet(alpha, ..., alpha)

    With a large alpha, all workers hold the classes in the same proportions; with a small alpha,
    each class goes to one worker. Shares are rounded to whole examples. The shares of all classes
    are drawn again until every worker holds `least` examples, 1000 times at most.

    Args:
      targets: int [examples], the labels.
      workers: number of workers.
      alpha: concentration, positive.
      seed: the seed of the shares, and of the choice of examples of a class.
      least: number of examples that every worker must hold.

    Returns:
      An array of example numbers for each worker.

    Raises:
      ConfigurationError: the targets are not integers, the examples are too few, or no draw gives
        every worker `least` examples.

    >>> shards = dirichlet_shards(np.repeat([0, 1], 50), workers=2, alpha=0.5, seed=0)
    >>> sum(map(len, shards))
    100

    Reference: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks",
    ICML 2019, https://arxiv.org/abs/1905.12022. Hsu, Qi, Brown, "Measuring the Effects of
    Non-Identical Data Distribution for Federated Visual Classification", 2019,
    https://arxiv.org/abs/1909.06335, draw for each worker the shares of its classes instead.
    """
    if not np.issubdtype(targets.dtype, np.integer):
        raise ConfigurationError(
            f"partition 'dirichlet' needs integer labels, and the targets are {targets.dtype}"
        )
    if len(targets) < workers * least:
        raise ConfigurationError(
            f"{len(targets)} examples are too few for {workers} workers that need {least} each"
        )
    generator = np.random.default_rng((seed, seeds.ASSIGNMENT))
    counts = _dirichlet_counts(generator, np.unique_counts(targets).counts, workers, alpha, least)
    shuffled = generator.permutation(len(targets)).astype(np.int32)
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    owners = np.repeat(np.tile(np.arange(workers), len(counts)), counts.ravel())
    return _deal(by_class[np.argsort(owners, kind="stable")], counts.sum(0))


def check_enough(examples: int, workers: int) -> None:
    """Raise an error if there are fewer examples than workers."""
    if examples < workers:
        raise ConfigurationError(f"{examples} examples are too few for {workers} workers")


def sorted_sizes(examples: int, workers: int) -> NDArray[np.int64]:
    """Number of examples that each worker holds in equal shards, [workers]."""
    check_enough(examples, workers)
    return _even(examples, workers)


def unequal_sizes(fractions: tuple[float, ...], examples: int, workers: int) -> NDArray[np.int64]:
    """Number of examples that each worker holds in groups with these fractions, [workers]."""
    groups = len(fractions)
    if workers % groups:
        raise ConfigurationError(f"{workers} workers do not divide into {groups} unequal groups")
    bounds = np.rint(np.cumsum((0.0, *fractions)) * examples).astype(np.int64)
    bounds[-1] = examples  # the fractions sum to 1 only up to rounding
    held, members = np.diff(bounds), workers // groups
    for fraction, number in zip(fractions, held, strict=True):
        if number < members:
            raise ConfigurationError(
                f"a fraction {fraction} of {examples} examples is {number}, too few for the "
                f"{members} workers of its group"
            )
    return np.concatenate([_even(int(number), members) for number in held])


def _dirichlet_counts(
    generator: np.random.Generator,
    sizes: NDArray[np.int64],
    workers: int,
    alpha: float,
    least: int,
) -> NDArray[np.int64]:
    """Number of examples of each class that each worker holds, [classes, workers]."""
    best = -1, -1  # of the draw with the largest smallest shard: its size, and the worker's number
    for _ in range(_DRAWS):
        shares = generator.dirichlet(np.full(workers, alpha), size=len(sizes))
        bounds = np.rint(shares.cumsum(1) * sizes[:, None]).astype(np.int64)
        bounds[:, -1] = sizes  # the shares sum to 1 only up to rounding
        counts = np.diff(bounds, axis=1, prepend=0)
        held = counts.sum(0)
        if held.min() >= least:
            return counts
        best = max(best, (int(held.min()), int(held.argmin())))
    raise ConfigurationError(
        f"none of {_DRAWS} draws with alpha {alpha:g} gives each of {workers} workers {least} of "
        f"the {sizes.sum()} examples: in the best draw worker {best[1]} holds {best[0]}; use a "
        "larger alpha, fewer workers or smaller batches"
    )


def _deal(order: NDArray[np.int32], sizes: NDArray[np.int64]) -> list[NDArray[np.int32]]:
    return np.split(order, np.cumsum(sizes)[:-1])


def _even(examples: int, parts: int) -> NDArray[np.int64]:
    return examples // parts + (np.arange(parts) < examples % parts)
