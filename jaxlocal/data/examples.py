"""Sources of examples, which are read by number, one by one or all at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxlocal.errors import ConfigurationError

Examples = dict[str, NDArray[Any]]


class ExampleSource(Protocol):
    """A source of examples {"inputs": array, "targets": scalar} by number, which can be pickled."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> dict[str, Any]: ...
    def __getitems__(self, numbers: Sequence[int], /) -> list[dict[str, Any]]: ...

    def examples(self) -> Examples:
        """Read all examples, {"inputs": [n, ...], "targets": [n]}."""

    def targets(self) -> NDArray[Any]:
        """Read all targets [n], without the inputs where the files allow it."""


@dataclass(frozen=True)
class ArraySource:
    """A source of examples that are in memory.

    Args:
      arrays: {"inputs": [n, ...], "targets": [n]}, of numbers.

    Raises:
      ConfigurationError: there are no targets, or the arrays are not of numbers or not of the same
        number of examples.

    >>> source = ArraySource({"inputs": np.eye(3), "targets": np.arange(3)})
    >>> len(source), source[2]
    (3, {'inputs': array([0., 0., 1.]), 'targets': np.int64(2)})
    """

    arrays: Examples

    def __post_init__(self) -> None:
        if not isinstance(self.arrays, Mapping) or "targets" not in self.arrays:
            got = ", ".join(map(str, self.arrays)) if isinstance(self.arrays, Mapping) else ""
            raise ConfigurationError(
                'examples are a dictionary {"inputs": [n, ...], "targets": [n]}, got '
                f"{got or type(self.arrays).__name__}"
            )
        check_numbers(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays["targets"])

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {key: values[number] for key, values in self.arrays.items()}

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [self[number] for number in numbers]

    def examples(self) -> Examples:
        return self.arrays

    def targets(self) -> NDArray[Any]:
        return self.arrays["targets"]


def check_numbers(arrays: Mapping[str, Any]) -> None:
    """Check that arrays hold numbers, of the same number of examples.

    Raises:
      ConfigurationError: one does not.

    >>> check_numbers({"inputs": np.zeros((2, 3)), "targets": np.array([0, 1])})
    """
    sizes = {}
    for name, values in arrays.items():
        if not hasattr(values, "dtype") or not np.ndim(values) or values.dtype.kind in "OSUMm":
            got = values.dtype if hasattr(values, "dtype") else type(values).__name__
            raise ConfigurationError(f"the {name} must be an array [n, ...] of numbers, got {got}")
        sizes[name] = len(values)
    if len(set(sizes.values())) > 1:
        counts = " and ".join(f"{size} {name}" for name, size in sizes.items())
        raise ConfigurationError(f"there must be as many targets as inputs, got {counts}")


def check_examples(name: str, examples: Examples, classes: int) -> None:
    """Check that a dataset has the classes that it says, and no number that is not finite.

    Args:
      name: the dataset's.
      examples: {"inputs": [n, ...], "targets": [n, ...]}; either may be absent.
      classes: number of classes; 0 for regression.

    Raises:
      ConfigurationError: a label is not an integer from 0 to classes - 1, or an input or a target
        of a regression is NaN or infinite.

    >>> check_examples("mine", {"targets": np.array([0, 9, -1])}, classes=10)
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: the labels of mine go from -1 to 9, and it has 10 classes
    """
    check_numbers(examples)
    labels = examples.get("targets") if classes else None
    if labels is not None and labels.dtype.kind not in "iub":
        raise ConfigurationError(
            f"the labels of {name} must be integers from 0 to {classes - 1}, got {labels.dtype}"
        )
    if labels is not None and labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise ConfigurationError(
            f"the labels of {name} go from {labels.min()} to {labels.max()}, and it has {classes} "
            "classes"
        )
    for key, values in examples.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            number = np.argwhere(~np.isfinite(values))[0][0]
            raise ConfigurationError(
                f"the {key} of {name} are not all finite: example {number} has a NaN or an infinity"
            )
