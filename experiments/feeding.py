"""What a run is fed: a resident pool and indices into it, or batches that are streamed; which of
them makes no difference to the numbers."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.build import Job
from jaxlocal.data import Batches, Stream, make_batches
from jaxlocal.data.examples import Examples, ExampleSource
from jaxlocal.evaluation import read_examples
from jaxlocal.types import Tree


@functools.lru_cache(maxsize=8)
def read_all(source: Callable[[], ExampleSource]) -> Examples:
    """All examples of a dataset's source, decoded once for all runs of this process."""
    return source().examples()


class Feed:
    """The batches of a job: `feed(start_tick, ticks)`, what `training.run` asks for."""

    def __init__(self, job: Job):
        assert job.dataset is not None
        config, self._grid = job.config, job.layout.shape
        self.config, self.augmentation, self._dataset = config, job.augmentation, job.dataset
        self.pool: Tree = () if config.stream else read_all(job.dataset.train_source)
        self.targets: np.ndarray = (
            self.pool["targets"] if isinstance(self.pool, dict) else job.dataset.targets()
        )
        self.batches: Batches = make_batches(
            config.partition, self.targets, *self._grid, config.batch_size, config.seed
        )
        self._stream = self._make_stream() if config.stream else None

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._stream:
            self._stream.close()

    def __call__(self, start_tick: int, ticks: int) -> Tree:
        if self._stream:
            return self._stream(start_tick, ticks)
        index = self.batches.indices(start_tick, ticks)
        if self.augmentation is None:
            return index
        config = self.config
        drawn = self.augmentation.draw(
            config.seed, start_tick, ticks, *self._grid, config.batch_size
        )
        return {"index": index, **drawn}

    def first(self, ticks: int) -> Tree:
        """The batches of the first ticks as they are stored, without augmentation."""
        index = self.batches.indices(0, ticks)
        return read_examples(self._dataset.train_source(), index) if self._stream else index

    def _make_stream(self) -> Stream:
        config = self.config
        return Stream(
            self._dataset.train_source(),
            self.batches.indices,
            config.seed,
            self.augmentation,
            processes=config.stream_workers,
        )
