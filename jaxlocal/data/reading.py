"""Reading: the batches of a step, put together from single examples.

A reader is a pure function of the step, and crosses to other processes.
"""

import functools
import io
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data.augment import CropFlip, crop_and_flip_on_host
from jaxlocal.errors import ConfigurationError

# The purposes of random numbers are distinct over this package: up to 5 they are those of others.
_TRANSFORM = 6
_ON_DEVICE = {np.dtype(np.int64): np.dtype(np.int32), np.dtype(np.float64): np.dtype(np.float32)}

Transform = Callable[[Any, np.random.Generator], Mapping[str, Any]]


class Source(Protocol):
    """Examples, read by number; may have `__getitems__(numbers)`, which reads many at once."""

    def __getitem__(self, number: int, /) -> Any: ...


class StreamError(RuntimeError):
    """A step could not be read."""

    def __init__(self, step: int, cause: str):
        super().__init__(step, cause)  # as its arguments, so that it crosses processes
        self.step, self.cause = step, cause

    def __str__(self) -> str:
        return f"step {self.step} could not be read: {self.cause}"


class Reader:
    """Reads the batches of a step: examples, transformed and stacked, then augmented."""

    def __init__(
        self,
        source: Source,
        indices: Callable[[int, int], NDArray],
        seed: int,
        augmentation: CropFlip | None,
        transform: Transform | None,
        workers: Sequence[int] | NDArray | None = None,
    ):
        self._source, self._indices, self._seed = source, indices, seed
        self._augmentation, self._transform = augmentation, transform
        self._whole = indices(0, 1).shape[1:]  # hubs, workers, batch
        everyone = range(math.prod(self._whole[:-1]))
        self._workers = list(everyone if workers is None else workers)  # that are read, by number
        batch = self._whole[-1:]
        self._grid = self._whole if workers is None else (len(self._workers), *batch)
        numbers = self._of_workers(indices(0, 1)[0])
        self._form: dict[str, tuple[tuple[int, ...], np.dtype]] = {}  # of every example
        try:
            [first] = self._examples(numbers.ravel()[:1].tolist(), 0)
        except Exception as error:
            raise ConfigurationError(f"the first example cannot be read: {told(error)}") from error
        self._form = _form(first)
        if augmentation and ("inputs" not in first or first["inputs"].ndim != 3):
            raise ConfigurationError(
                f"{augmentation} needs inputs [height, width, channels], got {_shown(self._form)}"
            )

    @property
    def step_bytes(self) -> int:
        sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in self._form.values())
        return max(1, math.prod(self._grid) * sum(sizes))

    def empty(self, steps: int) -> dict[str, NDArray]:
        """Arrays for the batches of some steps."""
        return {
            name: np.empty((steps, *self._grid, *shape), dtype)
            for name, (shape, dtype) in self._form.items()
        }

    def __call__(self, step: int) -> dict[str, NDArray]:
        try:
            return self._read(step)
        except BaseException as error:  # sys.exit too: Grain waits for ever for who left politely
            raise StreamError(step, told(error)) from error

    def _read(self, step: int) -> dict[str, NDArray]:
        numbers = self._of_workers(self._indices(step, 1)[0])
        examples = self._examples(numbers.ravel().tolist(), step)
        batches = {
            name: np.stack([example[name] for example in examples]).reshape(*self._grid, *shape)
            for name, (shape, _) in self._form.items()
        }
        if self._augmentation:
            draws = self._augmentation.draw(self._seed, step, 1, *self._whole)
            moves = (self._of_workers(draws[name][0]) for name in ("shift", "flip"))
            batches["inputs"] = crop_and_flip_on_host(batches["inputs"], *moves)
        return batches

    def _of_workers(self, values: NDArray) -> NDArray:
        """The rows, of arrays [hubs, workers, batch, ...], of the workers that are read."""
        rows = values.reshape(-1, *values.shape[2:])[self._workers]
        return rows.reshape(*self._grid, *values.shape[3:])

    def _examples(self, numbers: list[int], step: int) -> list[dict[str, NDArray]]:
        at_once = getattr(self._source, "__getitems__", None)
        found = iter(at_once(numbers) if at_once else map(self._source.__getitem__, numbers))
        examples = []
        for place, number in enumerate(numbers):
            try:
                examples.append(self._prepared(next(found), step, place))
            except Exception as error:
                error.add_note(f"in example {number}")
                raise
        return examples

    def _prepared(self, example: Any, step: int, place: int) -> dict[str, NDArray]:
        if self._transform:
            row, at = divmod(place, self._grid[-1])
            purpose = (self._seed, _TRANSFORM, step, self._workers[row], at)
            example = self._transform(example, np.random.default_rng(purpose))
        arrays = {name: np.asarray(value) for name, value in example.items()}
        for name, array in arrays.items():
            arrays[name] = array.astype(_ON_DEVICE.get(array.dtype, array.dtype), copy=False)
        form = _form(arrays)
        if self._form and form != self._form:
            raise ValueError(f"{_shown(form)}, where the first example is {_shown(self._form)}")
        return arrays

    def __reduce__(self) -> Any:
        return _rebuilt, (pickled(self.__dict__),)


def _form(arrays: dict[str, NDArray]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def _shown(form: dict[str, tuple[tuple[int, ...], np.dtype]]) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in form.items())


def pickled(value: Any) -> bytes:
    """As Grain pickles, functions by value where need be, and memoized local ones too."""
    import cloudpickle

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, functools._lru_cache_wrapper) and "<locals>" in obj.__qualname__:
                return _memoized, (obj.__wrapped__, obj.cache_parameters())
            return super().reducer_override(obj)

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def _memoized(function: Callable[..., Any], parameters: dict[str, Any]) -> Callable[..., Any]:
    return functools.lru_cache(**parameters)(function)


def _rebuilt(state: bytes) -> Reader:
    reader = Reader.__new__(Reader)
    reader.__dict__ = pickle.loads(state)
    return reader


def told(error: BaseException) -> str:
    """An error in one line."""
    notes = " ".join(getattr(error, "__notes__", []))
    words = " ".join(f"{error} {notes}".split())[:400]
    return f"{type(error).__name__}: {words}"
