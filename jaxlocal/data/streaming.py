"""Streaming: read, augment and stack batches in the background by Grain.

A stream serves datasets that are too large for a device. The examples and the augmentation of a
step are a pure function of seed and step, so a stream gives the same bits as a pool of examples on
the device. The next step is the only state of a stream, and a checkpoint of the run keeps it.

Processes are started by spawn, and import the main module of the program. So a script that streams
with processes must start its work below `if __name__ == "__main__":`; a notebook need not. The
processes take a few seconds to start, since Grain imports JAX; they use no device. absl flags need
not be parsed.
"""

import importlib.util
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import util
from typing import Any

from numpy.typing import NDArray

from jaxlocal.data.augmentation import Augmentation
from jaxlocal.data.checks import check_whole
from jaxlocal.data.reading import Reader, Source, StreamError, Transform, in_one_line, pickled
from jaxlocal.errors import ConfigurationError

_LONGEST_BUFFER = 256  # steps
_SHARED_MEMORY = "/dev/shm"


class Stream:
    """Read batches from a source in the background; `stream(start_step, steps)` gives arrays.

    Args:
      source: the examples {"inputs", "targets"} by number; after `transform`, all have one shape.
        With `processes=0`, several threads read it at once; else it is pickled for each process.
      indices: `indices(start_step, steps)` gives the example numbers [steps, hubs, workers, batch],
        such as `Batches.indices`.
      seed: the seed of `augmentation` and `transform`.
      augmentation: applied to images [H, W, C], after `transform`.
      transform: `transform(example, generator)` gives the example to use, for instance decoded and
        resized. The generator is seeded by (seed, step, worker, position in the batch).
      processes: number of processes that read; 0 for threads of this process. Processes pay where
        `transform` is slow.
      buffer_bytes: approximate size of the steps that are read ahead; it is a few steps at least.
      workers: ascending numbers of the workers whose examples are read, such as
        `RoundFn.local_workers`. The arrays are then [steps, these workers, batch, ...], as
        `RoundFn.local_batches` takes them. By default, all workers are read, as [steps, hubs,
        workers, batch, ...].

    Raises:
      ConfigurationError: the first example cannot be read or does not fit the augmentation, a value
        cannot be pickled, the shared memory is too small, or Grain is not installed.
      StreamError: raised by a call where an example cannot be read or a process died.

    >>> import numpy as np
    >>> source = [{"inputs": np.full((4, 4, 1), n, np.uint8), "targets": n} for n in range(10)]
    >>> with Stream(source, lambda start, steps: np.ones((steps, 1, 2, 3), int)) as stream:
    ...     {name: values.shape for name, values in stream(0, 5).items()}
    {'inputs': (5, 1, 2, 3, 4, 4, 1), 'targets': (5, 1, 2, 3)}
    """

    def __init__(
        self,
        source: Source,
        indices: Callable[[int, int], NDArray[Any]],
        seed: int = 0,
        augmentation: Augmentation | None = None,
        transform: Transform | None = None,
        processes: int = 0,
        buffer_bytes: int = 2**28,
        workers: Sequence[int] | NDArray[Any] | None = None,
    ):
        if not importlib.util.find_spec("grain"):
            raise ConfigurationError(
                "streaming needs grain, which is not installed: pip install 'jaxlocal[experiments]'"
            )
        check_whole(0, seed=seed, processes=processes, buffer_bytes=buffer_bytes)
        self._reader = Reader(source, indices, seed, augmentation, transform, workers)
        self._processes = processes
        self._buffer = _buffer_steps(self._reader.step_bytes, processes, buffer_bytes)
        if processes:
            _check_pickles(self._reader)
        self._next_step = 0
        self._running: list[Any] = []  # Grain's iterator, if it runs
        # Grain ends its processes only when its iterator is closed. The priority closes it at exit
        # before the threads that free its memory end.
        util.Finalize(self, _end, args=(self._running,), exitpriority=100)

    def __call__(self, start_step: int, steps: int) -> dict[str, NDArray[Any]]:
        """Read the batches of some steps.

        A call that starts where the last one ended uses the steps that were read ahead. Any other
        call restarts the reading.

        Args:
          start_step: the first step.
          steps: number of steps.

        Returns:
          Arrays by name, [steps, hubs, workers, batch, ...], which the caller may change.

        Raises:
          StreamError: an example cannot be read, or a process died.
        """
        check_whole(0, start_step=start_step, steps=steps)
        iterator = self._from(start_step)
        out = self._reader.empty(steps)
        try:
            for step in range(steps):
                for name, values in next(iterator).items():
                    out[name][step] = values
                self._next_step += 1
        except StreamError as error:
            self.close()
            # A new error, since Grain adds paragraphs to the text of the error that it passes on.
            raise StreamError(self._next_step, error.cause) from error.__cause__
        except Exception as error:
            self.close()
            raise StreamError(self._next_step, _why(error)) from error
        except BaseException:  # an interrupt may have lost a step
            self.close()
            raise
        return out

    def close(self) -> None:
        """End the threads and processes; a later call starts new ones."""
        _end(self._running)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _from(self, step: int) -> Iterator[dict[str, NDArray[Any]]]:
        if not self._running or step != self._next_step:
            self.close()
            self._running.append(iter(self._dataset(step)))
            self._next_step = step
        iterator: Iterator[dict[str, NDArray[Any]]] = self._running[0]
        return iterator

    def _dataset(self, start_step: int) -> Any:
        """Grain's pipeline over the steps from `start_step` on; its elements are steps."""
        import grain

        steps = grain.MapDataset.range(start_step, sys.maxsize).map(self._reader)
        if not self._processes:
            threads = min(os.cpu_count() or 1, self._buffer)
            # A daemon thread fills the buffer, since at exit Python waits until the threads of a
            # pool have done all their work.
            read = steps.to_iter_dataset(grain.ReadOptions(threads, threads))
            return grain.experimental.ThreadPrefetchIterDataset(
                read, prefetch_buffer_size=self._buffer
            )
        _let_flags_be_unparsed()
        options = grain.MultiprocessingOptions(self._processes, self._buffer)
        read = steps.to_iter_dataset(grain.ReadOptions(0, 0))
        return read.mp_prefetch(options, worker_init_fn=_begin_process)


def _end(running: list[Any]) -> None:
    while running:
        running.pop().close()


def _check_pickles(reader: Reader) -> None:
    try:
        pickled(reader)
    except Exception as error:
        raise ConfigurationError(
            f"a source that other processes read must pickle: {in_one_line(error)}; processes=0 "
            "reads it in this process"
        ) from error


def _buffer_steps(step_bytes: int, processes: int, buffer_bytes: int) -> int:
    """Number of steps that Grain buffers: in all, or in each process."""
    if not processes:
        return min(max(1, buffer_bytes // step_bytes), _LONGEST_BUFFER)
    if os.path.exists(_SHARED_MEMORY):  # steps go through it; if it is full, the process dies
        free = shutil.disk_usage(_SHARED_MEMORY).free
        if 4 * processes * step_bytes > free:
            raise ConfigurationError(
                f"{processes} processes that read steps of {step_bytes / 2**20:.1f} MiB need "
                f"{4 * processes * step_bytes / 2**20:.1f} MiB in {_SHARED_MEMORY}, which has "
                f"{free / 2**20:.1f} MiB free"
            )
        buffer_bytes = min(buffer_bytes, free // 2)
    # A process holds its buffer and one more step, and so does the thread that receives from it.
    each = buffer_bytes // (2 * step_bytes * processes) - 1
    return min(max(1, each), max(1, _LONGEST_BUFFER // processes))


def _let_flags_be_unparsed() -> None:
    """Mark Grain's absl flags as parsed; Grain reads them, and only absl programs parse them."""
    from absl import flags

    for name in flags.FLAGS:
        if name.startswith("grain_"):
            flags.FLAGS[name].present = flags.FLAGS[name].present or 1


def _begin_process(number: int, processes: int) -> None:
    """Set up a process: ignore Ctrl-C, which its parent handles, and end when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _why(error: Exception) -> str:
    """The cause of Grain's error, with the likely reason where a process died."""
    found = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
    if not found:
        return in_one_line(error)
    status = int(found[1])
    if status < 0:
        name = signal.Signals(-status).name
        hint = {"SIGKILL": ", perhaps for want of memory", "SIGBUS": f": {_SHARED_MEMORY} is full"}
        return f"a reading process was ended by {name}{hint.get(name, '')}"
    return (
        f"a reading process ended with status {status}, which happens where the main module has no "
        '`if __name__ == "__main__":`'
    )
