"""Batches: the examples that each worker takes at each step.

Example numbers are a pure function of (seed, partition, first step, number of steps), so a run can
be resumed at any step and cut into calls at any step. Workers are numbered hub by hub; the numbers
do not depend on the grouping into hubs.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data import seeds
from jaxlocal.data.checks import check_count, check_memory, check_whole, labels_of
from jaxlocal.data.partitions import Partition, assign, parse_partition, shard_sizes
from jaxlocal.errors import ConfigurationError

# fill(start_step, out) writes the example numbers of the steps from start_step on to
# out [steps, workers, batch].
_Fill = Callable[[int, NDArray[np.int32]], None]


class BatchPlan(NamedTuple):
    """Sizes of shards and epochs, which are known without reading any inputs."""

    shard_sizes: NDArray[np.int64]  # [hubs, workers_per_hub], number of examples a worker holds
    epoch_steps: int  # steps in which all workers together take each example about once


class Batches(NamedTuple):
    """The batches of a run, as example numbers.

    `indices(start_step, steps)` gives the example numbers of some steps, int32 [steps, hubs,
    workers_per_hub, batch_size].
    """

    indices: Callable[[int, int], NDArray[np.int32]]
    shard_sizes: NDArray[np.int64]  # [hubs, workers_per_hub], number of examples a worker holds
    epoch_steps: int  # steps in which all workers together take each example about once
    shards: list[NDArray[np.int32]]  # example numbers of each worker; [] without fixed shards


def plan_batches(
    spec: str,
    examples: int,
    hubs: int,
    workers_per_hub: int,
    batch_size: int,
    targets: Callable[[], NDArray[Any]] | None = None,
    seed: int = 0,
) -> BatchPlan:
    """Compute the sizes of shards and the length of an epoch, without reading inputs.

    An epoch is max(1, floor(examples / (workers * batch_size))) steps.

    Args:
      spec: the partition, see `jaxlocal.data.partitions`.
      examples: number of training examples.
      hubs, workers_per_hub, batch_size: numbers of hubs, of workers in a hub and of examples in a
        batch, all at least 1.
      targets: `targets()` reads the labels [examples]. It is called for `dirichlet` only, whose
        sizes depend on the labels.
      seed: the run's seed, not negative; the sizes of `dirichlet` depend on it.

    Returns:
      The plan.

    Raises:
      ConfigurationError: the spec is wrong, a size is not positive, the seed is negative, a batch
        is larger than the shard of a worker, or `dirichlet` is given no labels.

    >>> plan_batches("iid", examples=60_000, hubs=2, workers_per_hub=4, batch_size=16).epoch_steps
    468
    """
    check_whole(1, hubs=hubs, workers_per_hub=workers_per_hub, batch_size=batch_size)
    check_whole(0, seed=seed)
    check_count(examples)
    partition, workers = parse_partition(spec), hubs * workers_per_hub
    if partition.labelled and targets is not None:
        shards = assign(partition, labels_of(targets()), workers, seed, least=batch_size)
        held = np.array([len(shard) for shard in shards])
    else:
        held = shard_sizes(partition, examples, workers)
    if partition.kind != "fresh" and batch_size > held.min():
        worker = int(held.argmin())
        raise ConfigurationError(
            f"a batch of {batch_size} is larger than the shard of worker {worker}, which holds "
            f"{held[worker]} of the {examples} examples under partition {spec!r}"
        )
    epoch_steps = max(1, examples // (workers * batch_size))
    return BatchPlan(held.reshape(hubs, workers_per_hub), epoch_steps)


def make_batches(
    spec: str,
    targets: NDArray[Any],
    hubs: int,
    workers_per_hub: int,
    batch_size: int,
    seed: int,
    distances: NDArray[Any] | None = None,
) -> Batches:
    """Make the batches of a run: the example numbers of each worker at each step.

    - `iid`: every epoch takes one permutation of all examples, without repeats. The examples that
      do not fill a step are left out; they differ from epoch to epoch.
    - `fresh`: every batch is drawn uniformly from all examples, with replacement.
    - `reused:STEPS`: every STEPS steps, each worker draws 1/workers of all examples, without
      replacement and independently of the others. It shuffles them before each pass over them; the
      examples that do not fill a batch are left out of that pass. With STEPS the steps between hub
      averages, it is what the code released with MLL-SGD does.
    - `sorted`, `by_distance`, `unequal`, `dirichlet`: each worker shuffles its shard before each
      pass over it. The examples that do not fill a batch are left out of that pass.

    Args:
      spec: the partition, see `jaxlocal.data.partitions`.
      targets: [examples], the labels. `sorted` and `dirichlet` partition by them; the other kinds
        use only their number.
      hubs, workers_per_hub, batch_size: numbers of hubs, of workers in a hub and of examples in a
        batch, all at least 1.
      seed: the seed of all random choices here, not negative.
      distances: [examples], the signed distances to a separating hyperplane, by which `by_distance`
        partitions.

    Returns:
      The batches; `indices` may be called from any thread.

    Raises:
      ConfigurationError: see `plan_batches`; or there are no distances for `by_distance`.

    >>> batches = make_batches("iid", np.zeros(100), 2, 3, 4, seed=0)
    >>> batches.indices(0, 10).shape
    (10, 2, 3, 4)
    >>> bool((batches.indices(0, 10)[7:] == batches.indices(7, 3)).all())
    True
    """
    targets, grid = labels_of(targets), (hubs, workers_per_hub)
    plan = plan_batches(spec, len(targets), *grid, batch_size, lambda: targets, seed)
    partition, workers = parse_partition(spec), hubs * workers_per_hub
    if partition.kind == "by_distance":
        targets = _checked(distances, len(targets))
    shards = assign(partition, targets, workers, seed, batch_size) if partition.fixed else []
    fill = _fill(partition, len(targets), workers, shards, batch_size, seed)

    def indices(start_step: int, steps: int) -> NDArray[np.int32]:
        check_whole(0, start_step=start_step, steps=steps)
        check_memory(f"indices of {steps} steps", 4 * steps * workers * batch_size)
        out = np.empty((steps, workers, batch_size), np.int32)
        fill(start_step, out)
        return out.reshape(steps, *grid, batch_size)

    return Batches(indices, *plan, shards)


def _checked(distances: NDArray[Any] | None, examples: int) -> NDArray[Any]:
    if distances is None:
        raise ConfigurationError(
            "partition 'by_distance' is for a dataset that defines a separating hyperplane"
        )
    distances = labels_of(distances)
    if distances.shape != (examples,):
        raise ConfigurationError(
            f"there must be one distance for each of {examples} examples, got the shape "
            f"{list(distances.shape)}"
        )
    return distances


def _fill(
    partition: Partition,
    examples: int,
    workers: int,
    shards: list[NDArray[np.int32]],
    batch_size: int,
    seed: int,
) -> _Fill:
    if partition.kind == "iid":
        return _fill_iid(examples, workers, batch_size, seed)
    if partition.kind == "fresh":
        return _fill_fresh(examples, seed)
    if partition.kind == "reused":
        return _fill_reused(examples, workers, batch_size, partition.steps, seed)
    return _fill_shards(shards, batch_size, seed)


def _fill_iid(examples: int, workers: int, batch_size: int, seed: int) -> _Fill:
    steps = examples // (workers * batch_size)
    used = steps * workers * batch_size

    @functools.lru_cache(maxsize=1)
    def epoch(number: int) -> NDArray[Any]:
        order = np.random.default_rng((seed, seeds.EPOCH, number)).permutation(examples)
        return order[:used].reshape(steps, workers, batch_size)

    def fill(start_step: int, out: NDArray[np.int32]) -> None:
        for number, source, target in _passes(start_step, len(out), steps):
            out[target] = epoch(number)[source]

    return fill


def _fill_fresh(examples: int, seed: int) -> _Fill:
    def fill(start_step: int, out: NDArray[np.int32]) -> None:
        for step, batch in enumerate(out, start_step):
            generator = np.random.default_rng((seed, seeds.DRAW, step))
            batch[:] = generator.integers(examples, size=batch.shape, dtype=np.int32)

    return fill


def _fill_reused(examples: int, workers: int, batch_size: int, period: int, seed: int) -> _Fill:
    size = examples // workers
    steps = size // batch_size  # of a pass

    @functools.lru_cache(maxsize=1)
    def subsets(number: int) -> NDArray[np.int32]:
        """The examples of each worker after draw `number`, [workers, size]."""
        generator = np.random.default_rng((seed, seeds.REUSED, number))
        drawn = [generator.choice(examples, size, replace=False) for _ in range(workers)]
        return np.array(drawn, np.int32)

    @functools.lru_cache(maxsize=1)
    def reshuffled(number: int, time: int) -> NDArray[np.int32]:
        """The batches of a pass over the examples of a draw, [steps, workers, batch]."""
        generator = np.random.default_rng((seed, seeds.REUSED, number, time))
        order = generator.permuted(subsets(number), axis=1)[:, : steps * batch_size]
        return order.reshape(workers, steps, batch_size).swapaxes(0, 1)

    def fill(start_step: int, out: NDArray[np.int32]) -> None:
        for number, within, target in _passes(start_step, len(out), period):
            part = out[target]
            for time, source, place in _passes(within.start, len(part), steps):
                part[place] = reshuffled(number, time)[source]

    return fill


def _fill_shards(shards: list[NDArray[np.int32]], batch_size: int, seed: int) -> _Fill:
    # Workers with shards of equal size start their passes at the same step and share a generator.
    sizes = np.array([len(shard) for shard in shards])
    groups = [
        _fill_group(np.flatnonzero(sizes == size), shards, batch_size, seed)
        for size in np.unique(sizes)
    ]

    def fill(start_step: int, out: NDArray[np.int32]) -> None:
        for fill_group in groups:
            fill_group(start_step, out)

    return fill


def _fill_group(
    members: NDArray[Any], shards: list[NDArray[np.int32]], batch_size: int, seed: int
) -> _Fill:
    held = np.stack([shards[worker] for worker in members])
    size = held.shape[1]
    steps = size // batch_size

    @functools.lru_cache(maxsize=1)
    def reshuffled(number: int) -> NDArray[Any]:
        order = np.random.default_rng((seed, seeds.PASS, size, number)).permuted(held, axis=1)
        batches = order[:, : steps * batch_size].reshape(len(members), steps, batch_size)
        return batches.swapaxes(0, 1)

    def fill(start_step: int, out: NDArray[np.int32]) -> None:
        for number, source, target in _passes(start_step, len(out), steps):
            out[target, members] = reshuffled(number)[source]

    return fill


def _passes(start_step: int, steps: int, period: int) -> Iterator[tuple[int, slice, slice]]:
    """The passes that a call spans: the number, the steps in the pass, the steps in the call."""
    step, stop = start_step, start_step + steps
    while step < stop:
        number, first = divmod(step, period)
        count = min(period - first, stop - step)
        at = step - start_step
        yield number, slice(first, first + count), slice(at, at + count)
        step += count
