"""Sources of examples, which are read by number, one by one or all at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from jaxlocal.data.checks import check_numbers
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

    >>> import numpy as np
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
