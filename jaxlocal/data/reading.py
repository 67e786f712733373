"""Read the batches of a step, which are put together from single examples.

A reader is a pure function of the step, and can be pickled for other processes.
"""

import functools
import io
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data import seeds
from jaxlocal.data.augmentation import Augmentation
from jaxlocal.data.checks import check_memory
from jaxlocal.errors import ConfigurationError

_ON_DEVICE = {
    np.dtype(np.int64): np.dtype(np.int32),
    np.dtype(np.uint64): np.dtype(np.uint32),
    np.dtype(np.float64): np.dtype(np.float32),
}

Transform = Callable[[Any, np.random.Generator], Mapping[str, Any]]
_Form = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]  # shape and dtype of each array, by name


class Source(Protocol):
    """Examples by number; an optional `__getitems__(numbers)` reads several of them at once."""

    def __getitem__(self, number: int, /) -> Any: ...


class StreamError(RuntimeError):
    """The batches of a step could not be read.

    Args:
      step: the step.
      cause: the error, in one line.
    """

    def __init__(self, step: int, cause: str) -> None:
        super().__init__(step, cause)  # its arguments, so that it can be pickled
        self.step, self.cause = step, cause

    def __str__(self) -> str:
        return f"step {self.step} could not be read: {self.cause}"


class Reader:
    """Reads the batches of a step: it transforms, stacks and augments the examples."""

    def __init__(
        self,
        source: Source,
        indices: Callable[[int, int], NDArray[Any]],
        seed: int,
        augmentation: Augmentation | None,
        transform: Transform | None,
        workers: Sequence[int] | NDArray[Any] | None = None,
    ):
        for name, given in {"indices": indices, "transform": transform}.items():
            if given is not None and not callable(given):
                raise ConfigurationError(f"{name} must be a function, got {type(given).__name__}")
        self._source, self._indices, self._seed = source, indices, seed
        self._augmentation, self._transform = augmentation, transform
        self._whole: tuple[int, ...] = ()
        self._whole = self._numbers(0).shape  # hubs, workers, batch
        all_workers = range(math.prod(self._whole[:-1]))
        self._workers = list(all_workers if workers is None else workers)  # numbers of those read
        if not self._workers or sorted(set(self._workers) & set(all_workers)) != self._workers:
            raise ConfigurationError(
                f"workers must be ascending numbers from 0 to {len(all_workers) - 1}, got {workers}"
            )
        batch = self._whole[-1:]
        self._grid = self._whole if workers is None else (len(self._workers), *batch)
        numbers = self._of_workers(self._numbers(0))
        self._form: _Form = {}  # that of every example
        try:
            [first] = self._examples(numbers.ravel()[:1].tolist(), 0)
        except Exception as error:
            raise ConfigurationError(
                f"the first example cannot be read: {in_one_line(error)}"
            ) from error
        self._form = _form(first)
        if not self._form:
            raise ConfigurationError("an example must be a dictionary of arrays, got an empty one")
        if augmentation is not None and not isinstance(augmentation, Augmentation):
            raise ConfigurationError(
                "the augmentation of a stream is an Augmentation such as CropFlip, got "
                f"{type(augmentation).__name__}"
            )
        if augmentation and "inputs" not in first:
            raise ConfigurationError(
                f"{augmentation} needs inputs [height, width, channels], got {_shown(self._form)}"
            )
        if augmentation:
            augmentation.check(*self._form["inputs"])

    @property
    def step_bytes(self) -> int:
        """Bytes of the batches of one step."""
        sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in self._form.values())
        return max(1, math.prod(self._grid) * sum(sizes))

    def empty(self, steps: int) -> dict[str, NDArray[Any]]:
        """Empty arrays for the batches of some steps."""
        check_memory(f"batches of {steps} steps", steps * self.step_bytes)
        return {
            name: np.empty((steps, *self._grid, *shape), dtype)
            for name, (shape, dtype) in self._form.items()
        }

    def __call__(self, step: int) -> dict[str, NDArray[Any]]:
        try:
            return self._read(step)
        except BaseException as error:  # also sys.exit, after which Grain would wait forever
            raise StreamError(step, in_one_line(error)) from error

    def _read(self, step: int) -> dict[str, NDArray[Any]]:
        numbers = self._of_workers(self._numbers(step))
        examples = self._examples(numbers.ravel().tolist(), step)
        batches = {
            name: np.stack([example[name] for example in examples]).reshape(*self._grid, *shape)
            for name, (shape, _) in self._form.items()
        }
        if self._augmentation:
            draws = self._augmentation.draw(self._seed, step, 1, *self._whole)
            mine = {name: self._of_workers(values[0]) for name, values in draws.items()}
            batches["inputs"] = self._augmentation.apply_on_host(batches["inputs"], mine)
        return batches

    def _numbers(self, step: int) -> NDArray[Any]:
        """The example numbers of a step, [hubs, workers, batch]."""
        numbers = np.asarray(self._indices(step, 1))
        whole = np.issubdtype(numbers.dtype, np.integer)
        if numbers.ndim != 4 or len(numbers) != 1 or not whole or numbers.min(initial=0) < 0:
            raise ConfigurationError(
                "indices(start_step, 1) must give the numbers of examples, integers from 0 on [1, "
                f"hubs, workers, batch], got {numbers.dtype}{list(numbers.shape)}"
            )
        if self._whole and numbers.shape[1:] != self._whole:
            raise ConfigurationError(
                f"indices({step}, 1) must have the shape {[1, *self._whole]} of indices(0, 1), got "
                f"{list(numbers.shape)}"
            )
        return numbers[0]

    def _of_workers(self, values: NDArray[Any]) -> NDArray[Any]:
        """The rows of the workers that are read, of an array [hubs, workers, batch, ...]."""
        rows = values.reshape(-1, *values.shape[2:])[self._workers]
        return rows.reshape(*self._grid, *values.shape[3:])

    def _examples(self, numbers: list[int], step: int) -> list[dict[str, NDArray[Any]]]:
        at_once = getattr(self._source, "__getitems__", None)
        found = iter(at_once(numbers) if at_once else map(self._source.__getitem__, numbers))
        examples = []
        for position, number in enumerate(numbers):
            try:
                examples.append(self._prepared(next(found), step, position))
            except Exception as error:
                error.add_note(f"in example {number}")
                raise
        return examples

    def _prepared(self, example: Any, step: int, position: int) -> dict[str, NDArray[Any]]:
        if self._transform:
            row, column = divmod(position, self._grid[-1])
            seed = (self._seed, seeds.TRANSFORM, step, self._workers[row], column)
            example = self._transform(example, np.random.default_rng(seed))
        arrays = {name: np.asarray(value) for name, value in example.items()}
        for name, array in arrays.items():
            arrays[name] = _for_device(name, array)
        form = _form(arrays)
        if self._form and form != self._form:
            raise ValueError(f"{_shown(form)}, but the first example is {_shown(self._form)}")
        return arrays

    def __reduce__(self) -> Any:
        return _rebuilt, (pickled(self.__dict__),)


def _for_device(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """An array in the type of the devices."""
    if array.dtype.kind not in "biufcV":  # bfloat16 is of the kind V
        raise ValueError(f"{name} must hold numbers, got {array.dtype}")
    dtype = _ON_DEVICE.get(array.dtype, array.dtype)
    if dtype != array.dtype and array.size:
        limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
        values = array[np.isfinite(array)] if dtype.kind == "f" else array
        if values.min(initial=0) < limits.min or values.max(initial=0) > limits.max:
            raise ValueError(f"{name} from {values.min()} to {values.max()} do not fit {dtype}")
    return array.astype(dtype, copy=False)


def _form(arrays: dict[str, NDArray[Any]]) -> _Form:
    """Shape and dtype of each array."""
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def _shown(form: _Form) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in form.items())


def pickled(value: Any) -> bytes:
    """Pickle a value as Grain does, by value where needed, and also memoized local functions."""
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
    memoized: Callable[..., Any] = functools.lru_cache(**parameters)(function)
    return memoized


def _rebuilt(state: bytes) -> Reader:
    reader = Reader.__new__(Reader)
    reader.__dict__ = pickle.loads(state)
    return reader


def in_one_line(error: BaseException) -> str:
    """The class, the text and the notes of an error in one line."""
    notes = " ".join(getattr(error, "__notes__", []))
    text = " ".join(f"{error} {notes}".split())[:400]
    return f"{type(error).__name__}: {text}"
