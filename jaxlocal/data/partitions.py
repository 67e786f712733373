"""Partitions: which worker holds which examples.

| spec | who holds what |
|---|---|
| `iid` | a global shuffle each epoch, disjoint equal shards; no lasting assignment |
| `fresh` | every batch is drawn from the whole set, uniformly with replacement |
| `sorted`, `sorted:OFFSET` | examples sorted by label, one contiguous shard per worker |
| `unequal`, `unequal:F1,F2,...` | groups of workers that hold these fractions of a shuffled set |
| `dirichlet`, `dirichlet:ALPHA` | each class spread over workers by shares drawn from a Dirichlet |
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxlocal.errors import ConfigurationError, unknown

PARTITIONS = ("iid", "fresh", "sorted", "unequal", "dirichlet")
UNEQUAL_FRACTIONS = (0.05, 0.1, 0.2, 0.25, 0.4)  # released with MLL-SGD

# The purposes of random numbers are distinct over this package: here 1, sources 0, batches 2 to 4.
_ASSIGNMENT = 1
_DRAWS = 1000  # of a Dirichlet partition, before it is given up


class Partition(NamedTuple):
    """A parsed spec."""

    kind: str  # one of PARTITIONS
    offset: float = 0.0  # sorted: rotation, in shards
    fractions: tuple[float, ...] = ()  # unequal: of the examples, one per group of workers
    alpha: float = 0.0  # dirichlet: its concentration

    @property
    def fixed(self) -> bool:
        """Whether a worker keeps the same examples over the whole run."""
        return self.kind in ("sorted", "unequal", "dirichlet")

    @property
    def labelled(self) -> bool:
        """Whether how much each worker holds depends on the labels."""
        return self.kind == "dirichlet"


def parse_partition(spec: str) -> Partition:
    """The partition that a spec names.

    Raises:
      ConfigurationError: an unknown kind, an offset outside [0, 1), fractions that are not positive
        or do not sum to 1 within 1e-6, or an alpha outside [1e-6, 1e6].

    >>> parse_partition("sorted:0.5").offset
    0.5
    >>> parse_partition("unequal:0.25,0.75").fractions
    (0.25, 0.75)
    >>> parse_partition("dirichlet").alpha
    0.5
    """
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
    if colon:
        raise ConfigurationError(f"partition {kind!r} takes no argument, got {spec!r}")
    return Partition(kind)


def shard_sizes(partition: Partition, examples: int, workers: int) -> NDArray[np.int64]:
    """How many examples each worker holds, [workers], known without reading any.

    Under `iid` that is its share of an epoch; under `fresh` everyone holds everything.

    Raises:
      ConfigurationError: a worker would hold nothing, the groups do not divide the workers, or the
        sizes depend on labels.

    >>> shard_sizes(parse_partition("unequal:0.25,0.75"), examples=80, workers=4)
    array([10, 10, 30, 30])
    """
    if partition.labelled:
        raise ConfigurationError(
            f"what workers hold under partition {partition.kind!r} depends on the labels of the "
            f"{examples} examples, and only their number is given"
        )
    if partition.kind == "fresh":
        return np.full(workers, examples)
    if examples < workers:
        raise ConfigurationError(f"{examples} examples are too few for {workers} workers")
    if partition.kind == "iid":
        return np.full(workers, examples // workers)
    if partition.kind == "sorted":
        return _even(examples, workers)
    return _unequal_sizes(partition.fractions, examples, workers)


def assign(
    partition: Partition, targets: NDArray, workers: int, seed: int, least: int = 1
) -> list[NDArray[np.int32]]:
    """The examples that each worker holds for the whole run: every example exactly once.

    Args:
      partition: a `sorted`, `unequal` or `dirichlet` one; the others assign nothing for good.
      targets: [examples] labels, or for `sorted` anything that sorts.
      workers: how many, over all hubs.
      seed: of `unequal` and `dirichlet`; `sorted` uses none.
      least: examples that a worker needs, e.g. a batch; only `dirichlet` can choose by it.

    Returns:
      One array of example numbers per worker, of the lengths that `shard_sizes` gives where it can.

    >>> for shard in assign(parse_partition("sorted"), np.array([1, 0, 1, 0]), workers=2, seed=0):
    ...     print(shard)
    [1 3]
    [0 2]
    """
    if not partition.fixed:
        raise ConfigurationError(f"partition {partition.kind!r} gives no worker a fixed shard")
    if partition.kind == "unequal":
        return unequal_shards(len(targets), workers, partition.fractions, seed)
    if targets.ndim != 1:
        raise ConfigurationError(
            f"partition {partition.kind!r} goes by one label of each example, and the targets are "
            f"{list(targets.shape)}"
        )
    if partition.kind == "sorted":
        return sorted_shards(targets, workers, partition.offset)
    return dirichlet_shards(targets, workers, partition.alpha, seed, least)


def sorted_shards(targets: NDArray, workers: int, offset: float = 0.0) -> list[NDArray[np.int32]]:
    """Contiguous shards of the examples in the order of their labels.

    The order is stable and circular; the first shard begins `offset` shards after its start. With
    20 workers on CIFAR-10, 0 gives twenty workers of one label each, and 0.5 gives ten workers of
    one label and ten of two. Sizes differ by one at most.

    Reference: Qin, Etesami, Uribe, "Faster Convergence of Local SGD for Over-Parameterized Models",
    TMLR 2024, https://arxiv.org/abs/2201.12719
    """
    sizes = shard_sizes(Partition("sorted"), len(targets), workers)
    order = np.argsort(targets, kind="stable").astype(np.int32)
    return _deal(np.roll(order, -round(offset * len(targets) / workers)), sizes)


def unequal_shards(
    examples: int, workers: int, fractions: tuple[float, ...], seed: int
) -> list[NDArray[np.int32]]:
    """Shards of a shuffled set: consecutive equal groups of workers hold the given fractions.

    Inside a group the examples are split evenly; sizes differ by one at most.

    Reference: Castiglia, Das, Patterson, "Multi-Level Local SGD: Distributed SGD for Heterogeneous
    Hierarchical Networks", ICLR 2021, https://arxiv.org/abs/2007.13819 (100 workers in five groups)
    """
    sizes = _unequal_sizes(fractions, examples, workers)
    order = np.random.default_rng((seed, _ASSIGNMENT)).permutation(examples).astype(np.int32)
    return _deal(order, sizes)


def dirichlet_shards(
    targets: NDArray, workers: int, alpha: float, seed: int, least: int = 1
) -> list[NDArray[np.int32]]:
    """Shards with a skew of labels: each class is spread over the workers by shares of its own.

        for each class:  shares over workers ~ Dirichlet(alpha, ..., alpha)

    As alpha grows every worker comes to hold the mix of the whole set, as it shrinks each class
    goes to one worker. Shares are rounded to examples, and those of all classes are drawn anew
    until every worker holds `least`, 1000 times at most.

    Args:
      targets: int [examples] labels.
      alpha: concentration, positive.
      least: examples that every worker must hold.

    Raises:
      ConfigurationError: targets that are no labels, too few examples for `least`, or no draw that
        gives it to everyone.

    Reference: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks",
    ICML 2019, https://arxiv.org/abs/1905.12022; Hsu, Qi, Brown, "Measuring the Effects of
    Non-Identical Data Distribution for Federated Visual Classification", 2019,
    https://arxiv.org/abs/1909.06335, draws shares of classes for each worker instead.
    """
    if not np.issubdtype(targets.dtype, np.integer):
        raise ConfigurationError(
            f"partition 'dirichlet' goes by class, and the targets are {targets.dtype} values of a "
            "regression"
        )
    if len(targets) < workers * least:
        raise ConfigurationError(
            f"{len(targets)} examples are too few for {workers} workers that need {least} each"
        )
    generator = np.random.default_rng((seed, _ASSIGNMENT))
    counts = _dirichlet_counts(generator, np.unique_counts(targets).counts, workers, alpha, least)
    shuffled = generator.permutation(len(targets)).astype(np.int32)
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    owners = np.repeat(np.tile(np.arange(workers), len(counts)), counts.ravel())
    return _deal(by_class[np.argsort(owners, kind="stable")], counts.sum(0))


def _dirichlet_counts(
    generator: np.random.Generator,
    sizes: NDArray[np.int64],
    workers: int,
    alpha: float,
    least: int,
) -> NDArray[np.int64]:
    """How many examples of each class each worker holds, [classes, workers]."""
    most = -1, -1  # what the worker with the least holds in the best draw, and who that is
    for _ in range(_DRAWS):
        shares = generator.dirichlet(np.full(workers, alpha), size=len(sizes))
        bounds = np.rint(shares.cumsum(1) * sizes[:, None]).astype(np.int64)
        bounds[:, -1] = sizes  # the shares' sum is 1 only up to rounding
        counts = np.diff(bounds, axis=1, prepend=0)
        held = counts.sum(0)
        if held.min() >= least:
            return counts
        most = max(most, (int(held.min()), int(held.argmin())))
    raise ConfigurationError(
        f"no draw of {_DRAWS} with alpha {alpha:g} gives each of {workers} workers its {least} of "
        f"the {sizes.sum()} examples: in the best of them worker {most[1]} holds {most[0]}; a "
        "larger alpha, fewer workers or smaller batches would help"
    )


def _deal(order: NDArray[np.int32], sizes: NDArray[np.int64]) -> list[NDArray[np.int32]]:
    return np.split(order, np.cumsum(sizes)[:-1])


def _even(examples: int, parts: int) -> NDArray[np.int64]:
    return examples // parts + (np.arange(parts) < examples % parts)


def _unequal_sizes(fractions: tuple[float, ...], examples: int, workers: int) -> NDArray[np.int64]:
    groups = len(fractions)
    if workers % groups:
        raise ConfigurationError(f"{workers} workers do not divide into {groups} unequal groups")
    bounds = np.rint(np.cumsum((0.0, *fractions)) * examples).astype(np.int64)
    bounds[-1] = examples  # the fractions' sum is 1 only up to rounding
    held, members = np.diff(bounds), workers // groups
    for fraction, number in zip(fractions, held, strict=True):
        if number < members:
            raise ConfigurationError(
                f"a fraction {fraction} of {examples} examples is {number}, too few for the "
                f"{members} workers of its group"
            )
    return np.concatenate([_even(int(number), members) for number in held])


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
    if not 1e-6 <= alpha <= 1e6:  # beyond, a worker has all or the same, and draws lose precision
        raise ConfigurationError(
            f"the alpha in partition {spec!r} must be from 1e-6 to 1e6, got {alpha}"
        )
    return alpha


def _number(spec: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"{text!r} in partition {spec!r} is not a number") from None
