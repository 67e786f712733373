"""The batches of a run: indices into a pool of examples, or examples that are streamed.

Both give the same numbers.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.building.job import Job
from jaxlocal.data import Batches, Stream, make_batches, parse_partition
from jaxlocal.data.checks import check_examples
from jaxlocal.data.examples import Examples, ExampleSource
from jaxlocal.data.varying import ResizedImages
from jaxlocal.parallel.mesh import local_rows, place_rows
from jaxlocal.training.evaluation import read_examples
from jaxlocal.types import Tree


@functools.lru_cache(maxsize=8)
def read_all(source: Callable[[], ExampleSource], name: str, classes: int) -> Examples:
    """Read and check all examples of a dataset's source, once for all runs of this process."""
    examples = source().examples()
    check_examples(name, examples, classes)
    return examples


class Feed:
    """The batches of a job, `feed(start_step, steps)`, as `jaxlocal.training.run` takes them.

    Close it, or use it as a context: streaming processes end then.
    """

    def __init__(self, job: Job):
        config, self._grid = job.config, job.layout.shape
        self.config, self.augmentation, self._dataset = config, job.augmentation, job.dataset
        data = job.dataset
        self.pool: Tree = (
            () if config.stream else read_all(data.train_source, data.name, data.classes)
        )
        self.batches = self._make_batches()
        self._mesh = job.mesh if config.stream and job.mesh.is_multi_process else None
        self._stream = self._make_stream() if config.stream else None

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._stream:
            self._stream.close()

    def __call__(self, start_step: int, steps: int) -> Tree:
        if self._stream:
            return self._placed(self._stream(start_step, steps))
        index = self.batches.indices(start_step, steps)
        if self.augmentation is None:
            return index
        config = self.config
        drawn = self.augmentation.draw(
            config.seed, start_step, steps, *self._grid, config.batch_size
        )
        return {"index": index, **drawn}

    @functools.cached_property
    def targets(self) -> np.ndarray:
        """The targets of all training examples; a stream has to read the files for them."""
        return self.pool["targets"] if isinstance(self.pool, dict) else self._dataset.targets()

    def first(self, steps: int) -> Tree:
        """The batches of the first steps as they are stored, without augmentation."""
        index = self.batches.indices(0, steps)
        if not self._stream:
            return index
        if self._mesh:
            index = index.reshape(steps, -1, index.shape[-1])[:, local_rows(self._mesh, self._grid)]
        return self._placed(read_examples(self._dataset.train_source(), index))

    def _placed(self, batches: Tree) -> Tree:
        """Global arrays, of the batches that every process reads for its workers alone."""
        return place_rows(batches, self._mesh, self._grid, axis=1) if self._mesh else batches

    def _make_batches(self) -> Batches:
        config, data = self.config, self._dataset
        partition = parse_partition(config.partition)
        distances = data.distances() if partition.kind == "by_distance" else None
        # The others need the number of the targets only.
        unread = np.broadcast_to(np.int32(0), data.train_examples)
        targets = self.targets if partition.sorts else unread
        return make_batches(
            config.partition, targets, *self._grid, config.batch_size, config.seed, distances
        )

    def _make_stream(self) -> Stream:
        config, source, transform = self.config, self._dataset.train_source(), None
        augmentation = self.augmentation
        if isinstance(source, ResizedImages):
            source, transform, augmentation = source.streamed(augmentation)
        return Stream(
            source,
            self.batches.indices,
            config.seed,
            augmentation,
            transform,
            processes=config.stream_workers,
            workers=local_rows(self._mesh, self._grid) if self._mesh else None,
        )
