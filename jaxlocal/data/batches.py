"""Batches: which examples each worker takes at each step.

Indices are a pure function of (seed, partition, first step, number of steps), so a run can resume,
and be cut into calls, anywhere. Workers are numbered hub by hub; grouping them into other hubs
changes no number.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data.partitions import Partition, assign, parse_partition, shard_sizes
from jaxlocal.errors import ConfigurationError

# The purposes of random numbers are distinct over this package: sources 0, partitions 1.
_EPOCH, _DRAW, _PASS = 2, 3, 4

# Fills an array [steps, workers, batch] with the examples of the steps from a first one on.
_Fill = Callable[[int, NDArray[np.int32]], None]


class BatchPlan(NamedTuple):
    """What is known of the batches from counts alone."""

    shard_sizes: NDArray[np.int64]  # [hubs, workers_per_hub], examples each worker holds
    epoch_steps: int  # steps in which all workers together take each example about once


class Batches(NamedTuple):
    """The batches of a run."""

    indices: Callable[[int, int], NDArray[np.int32]]
    """indices(start_step, steps): example numbers, [steps, hubs, workers_per_hub, batch_size]."""
    shard_sizes: NDArray[np.int64]  # [hubs, workers_per_hub], examples each worker holds
    epoch_steps: int  # steps in which all workers together take each example about once
    shards: list[NDArray[np.int32]]
    """The examples that each worker holds, hub by hub; empty where no one holds any for good."""


def plan_batches(
    spec: str,
    examples: int,
    hubs: int,
    workers_per_hub: int,
    batch_size: int,
    targets: Callable[[], NDArray] | None = None,
    seed: int = 0,
) -> BatchPlan:
    """Shard sizes and the length of an epoch, before any inputs are read.

    An epoch is floor(examples / (workers * batch_size)) steps, and at least one.

    Args:
      targets: reads the labels [examples]; called for `dirichlet` alone, whose sizes depend on
        them.
      seed: that of the run, on which the sizes of `dirichlet` depend too.

    Raises:
      ConfigurationError: a spec that is wrong, a size that is not positive, a negative seed, a
        batch larger than the shard of a worker, or labels that are needed and not given.

    >>> plan_batches("iid", examples=60_000, hubs=2, workers_per_hub=4, batch_size=16).epoch_steps
    468
    """
    sizes = {"hubs": hubs, "workers_per_hub": workers_per_hub, "batch_size": batch_size}
    for name, value in sizes.items():
        if value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value}")
    if seed < 0:
        raise ConfigurationError(f"seed must not be negative, got {seed}")
    partition, workers = parse_partition(spec), hubs * workers_per_hub
    if partition.labelled and targets is not None:
        shards = assign(partition, targets(), workers, seed, least=batch_size)
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
    targets: NDArray,
    hubs: int,
    workers_per_hub: int,
    batch_size: int,
    seed: int,
) -> Batches:
    """The batches of a run under a partition.

    - `iid`: one permutation of all examples an epoch, without repeats; what does not fill a step is
      left out, a different remainder each epoch.
    - `fresh`: uniform draws from the whole set, with replacement.
    - `sorted`, `unequal`, `dirichlet`: each worker reshuffles its own shard at each pass of its
      own; what does not fill a batch is left out of that pass.

    Args:
      spec: see `jaxlocal.data.partitions`.
      targets: [examples] labels; `sorted` and `dirichlet` go by them, the others need their number
        only.
      hubs, workers_per_hub, batch_size: sizes, all at least 1.
      seed: of every random choice here, not negative.

    Returns:
      Batches; its `indices` may be called from any thread.

    Raises:
      ConfigurationError: see `plan_batches`.

    >>> batches = make_batches("iid", np.zeros(100), 2, 3, 4, seed=0)
    >>> batches.indices(0, 10).shape
    (10, 2, 3, 4)
    >>> bool((batches.indices(0, 10)[7:] == batches.indices(7, 3)).all())
    True
    """
    grid = (hubs, workers_per_hub)
    plan = plan_batches(spec, len(targets), *grid, batch_size, lambda: targets, seed)
    partition, workers = parse_partition(spec), hubs * workers_per_hub
    shards = assign(partition, targets, workers, seed, batch_size) if partition.fixed else []
    fill = _fill(partition, len(targets), workers, shards, batch_size, seed)

    def indices(start_step: int, steps: int) -> NDArray[np.int32]:
        if start_step < 0 or steps < 0:
            raise ValueError(f"start_step and steps must not be negative: {start_step}, {steps}")
        out = np.empty((steps, workers, batch_size), np.int32)
        fill(start_step, out)
        return out.reshape(steps, *grid, batch_size)

    return Batches(indices, *plan, shards)


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
    return _fill_shards(shards, batch_size, seed)


def _fill_iid(examples: int, workers: int, batch_size: int, seed: int) -> _Fill:
    steps = examples // (workers * batch_size)
    used = steps * workers * batch_size

    @functools.lru_cache(maxsize=1)
    def epoch(number: int) -> NDArray:
        order = np.random.default_rng((seed, _EPOCH, number)).permutation(examples)
        return order[:used].reshape(steps, workers, batch_size)

    def fill(start_step: int, out: NDArray[np.int32]) -> None:
        for number, source, target in _passes(start_step, len(out), steps):
            out[target] = epoch(number)[source]

    return fill


def _fill_fresh(examples: int, seed: int) -> _Fill:
    def fill(start_step: int, out: NDArray[np.int32]) -> None:
        for step, batch in enumerate(out, start_step):
            generator = np.random.default_rng((seed, _DRAW, step))
            batch[:] = generator.integers(examples, size=batch.shape, dtype=np.int32)

    return fill


def _fill_shards(shards: list[NDArray[np.int32]], batch_size: int, seed: int) -> _Fill:
    # Workers with shards of one size begin their passes together, so one generator serves them all.
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
    members: NDArray, shards: list[NDArray[np.int32]], batch_size: int, seed: int
) -> _Fill:
    held = np.stack([shards[worker] for worker in members])
    size = held.shape[1]
    steps = size // batch_size

    @functools.lru_cache(maxsize=1)
    def reshuffled(number: int) -> NDArray:
        order = np.random.default_rng((seed, _PASS, size, number)).permuted(held, axis=1)
        batches = order[:, : steps * batch_size].reshape(len(members), steps, batch_size)
        return batches.swapaxes(0, 1)

    def fill(start_step: int, out: NDArray[np.int32]) -> None:
        for number, source, target in _passes(start_step, len(out), steps):
            out[target, members] = reshuffled(number)[source]

    return fill


def _passes(start_step: int, steps: int, period: int) -> Iterator[tuple[int, slice, slice]]:
    """For each pass of `period` steps: its number, which of its steps, their place in the call."""
    step, stop = start_step, start_step + steps
    while step < stop:
        number, first = divmod(step, period)
        count = min(period - first, stop - step)
        at = step - start_step
        yield number, slice(first, first + count), slice(at, at + count)
        step += count
