"""Examples by number: what datasets are read from, one by one or all at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

Examples = dict[str, NDArray]


class ExampleSource(Protocol):
    """Examples by number, {"inputs": array, "targets": scalar}; crosses to other processes."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> dict[str, Any]: ...
    def __getitems__(self, numbers: Sequence[int], /) -> list[dict[str, Any]]: ...

    def examples(self) -> Examples:
        """All of them, in two arrays."""

    def targets(self) -> NDArray:
        """All targets [n], read without the inputs where they lie apart."""


@dataclass(frozen=True)
class ArraySource:
    """Examples that are in memory.

    >>> import numpy as np
    >>> source = ArraySource({"inputs": np.eye(3), "targets": np.arange(3)})
    >>> len(source), source[2]
    (3, {'inputs': array([0., 0., 1.]), 'targets': np.int64(2)})
    """

    arrays: Examples

    def __len__(self) -> int:
        return len(self.arrays["targets"])

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {key: values[number] for key, values in self.arrays.items()}

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [self[number] for number in numbers]

    def examples(self) -> Examples:
        return self.arrays

    def targets(self) -> NDArray:
        return self.arrays["targets"]
