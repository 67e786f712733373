"""Streaming: batches read, augmented and stacked in the background by Grain, for sets too large
for a device.

Which examples and which augmentation belong to a step is a pure function of seed and step, so what
a stream gives is, bit for bit, what a resident pool gives. The step at which the next call starts
is all of a stream's state: a checkpoint of the run need keep nothing else.

Processes are started by spawn. They import the main module of the program anew, so a script that
streams with processes must start its work below `if __name__ == "__main__":`; a notebook need not.
They take a few seconds to start, since Grain imports JAX; no device is touched. absl flags need not
be parsed.
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

from jaxlocal.data.augment import CropFlip
from jaxlocal.data.reading import Reader, Source, StreamError, Transform, pickled, told
from jaxlocal.errors import ConfigurationError

_LONGEST_BUFFER = 256  # steps
_SHARED_MEMORY = "/dev/shm"


class Stream:
    """Batches from a source that is read in the background: `stream(start_step, steps)` → arrays.

    Args:
      source: of examples {"inputs", "targets"}, after `transform` all of one shape. It is read from
        several threads at once if `processes` is 0, else it is pickled to each process.
      indices: `indices(start_step, steps)` → example numbers [steps, hubs, workers, batch]; see
        `Batches`.
      seed: of `augmentation` and `transform`.
      augmentation: of images [H, W, C], after `transform`.
      transform: `transform(example, generator)` → example, e.g. to decode and resize; the generator
        is seeded by (seed, step, worker, place in the batch).
      processes: that read; 0 for threads of this one. Worth their start where `transform` is slow.
      buffer_bytes: of steps read ahead, about; at least a few steps, however large they are.
      workers: numbers, ascending, of the workers whose examples are read, such as
        `RoundFn.local_workers`; then the arrays are [steps, those workers, batch, ...], as
        `RoundFn.local_batches` takes them. By default all, on their grid.

    Raises:
      ConfigurationError: a first example that does not fit, something that cannot be pickled, too
        little shared memory, no Grain.
      StreamError: from a call: an example that cannot be read, or a process that died.

    >>> import numpy as np
    >>> source = [{"inputs": np.full((4, 4, 1), n, np.uint8), "targets": n} for n in range(10)]
    >>> with Stream(source, lambda start, steps: np.ones((steps, 1, 2, 3), int)) as stream:
    ...     {name: values.shape for name, values in stream(0, 5).items()}
    {'inputs': (5, 1, 2, 3, 4, 4, 1), 'targets': (5, 1, 2, 3)}
    """

    def __init__(
        self,
        source: Source,
        indices: Callable[[int, int], NDArray],
        seed: int = 0,
        augmentation: CropFlip | None = None,
        transform: Transform | None = None,
        processes: int = 0,
        buffer_bytes: int = 2**28,
        workers: Sequence[int] | NDArray | None = None,
    ):
        if not importlib.util.find_spec("grain"):
            raise ConfigurationError(
                "streaming needs grain, which is not installed: pip install 'jaxlocal[experiments]'"
            )
        for name, value in {"seed": seed, "processes": processes}.items():
            if value < 0:
                raise ConfigurationError(f"{name} must not be negative, got {value}")
        self._reader = Reader(source, indices, seed, augmentation, transform, workers)
        self._processes = processes
        self._buffer = _buffer_steps(self._reader.step_bytes, processes, buffer_bytes)
        if processes:
            _check_pickles(self._reader)
        self._next_step = 0
        self._running: list[Any] = []  # Grain's iterator, while there is one
        # Grain ends its processes when told to, not when nobody is left to ask; at exit it is told
        # before the threads that free its memory are gone.
        util.Finalize(self, _end, args=(self._running,), exitpriority=100)

    def __call__(self, start_step: int, steps: int) -> dict[str, NDArray]:
        """The batches of some steps: arrays [steps, hubs, workers, batch, ...], the caller's own.

        What has been read ahead serves a call that starts where the last one ended; any other
        starts reading anew.
        """
        iterator = self._from(start_step)
        out = self._reader.empty(steps)
        try:
            for place in range(steps):
                for name, values in next(iterator).items():
                    out[name][place] = values
                self._next_step += 1
        except StreamError as error:
            self.close()
            # A new one, since Grain adds paragraphs to what it passes on.
            raise StreamError(self._next_step, error.cause) from error.__cause__
        except Exception as error:
            self.close()
            raise StreamError(self._next_step, _why(error)) from error
        except BaseException:  # an interrupt, by which a step may have been lost
            self.close()
            raise
        return out

    def close(self) -> None:
        """End the threads and processes; a later call starts others."""
        _end(self._running)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _from(self, step: int) -> Iterator[dict[str, NDArray]]:
        if not self._running or step != self._next_step:
            self.close()
            self._running.append(iter(self._dataset(step)))
            self._next_step = step
        return self._running[0]

    def _dataset(self, start_step: int) -> Any:
        """Grain's pipeline over the steps from one on; its elements are batches of a step."""
        import grain

        steps = grain.MapDataset.range(start_step, sys.maxsize).map(self._reader)
        if not self._processes:
            threads = min(os.cpu_count() or 1, self._buffer)
            # The buffer is before a daemon thread, since at exit Python waits for all that is
            # left to do for the threads of a pool.
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
            f"a source that other processes read must pickle: {told(error)}; processes=0 reads "
            "it in this one"
        ) from error


def _buffer_steps(step_bytes: int, processes: int, buffer_bytes: int) -> int:
    """How many steps Grain is to buffer: in all, or for each process."""
    if not processes:
        return min(max(1, buffer_bytes // step_bytes), _LONGEST_BUFFER)
    if os.path.exists(_SHARED_MEMORY):  # through which steps go; a full one kills the process
        free = shutil.disk_usage(_SHARED_MEMORY).free
        if 4 * processes * step_bytes > free:
            raise ConfigurationError(
                f"{processes} processes that read steps of {step_bytes / 2**20:.1f} MiB need "
                f"{4 * processes * step_bytes / 2**20:.1f} MiB in {_SHARED_MEMORY}, which has "
                f"{free / 2**20:.1f} MiB free"
            )
        buffer_bytes = min(buffer_bytes, free // 2)
    # A process holds its buffer and a step more, and so does the thread that listens to it.
    each = buffer_bytes // (2 * step_bytes * processes) - 1
    return min(max(1, each), max(1, _LONGEST_BUFFER // processes))


def _let_flags_be_unparsed() -> None:
    """Grain asks absl for its flags, which only a program of absl's has parsed."""
    from absl import flags

    for name in flags.FLAGS:
        if name.startswith("grain_"):
            flags.FLAGS[name].present = flags.FLAGS[name].present or 1


def _begin_process(number: int, processes: int) -> None:
    """What a process does first: leave Ctrl-C to its parent, and end where that has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _why(error: Exception) -> str:
    """What Grain says of a process that died, with what it mostly is."""
    found = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
    if not found:
        return told(error)
    status = int(found[1])
    if status < 0:
        name = signal.Signals(-status).name
        hint = {"SIGKILL": ", perhaps for want of memory", "SIGBUS": f": {_SHARED_MEMORY} is full"}
        return f"a process that reads was ended by {name}{hint.get(name, '')}"
    return (
        f"a process that reads ended with status {status}, as it does where the main module has no "
        '`if __name__ == "__main__":`'
    )
