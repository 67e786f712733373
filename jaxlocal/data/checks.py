"""Checks of what a user gives: numbers, names, and arrays of examples."""

import os
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np

from jaxlocal.errors import ConfigurationError

_LONGEST_NAME = 200
_LARGEST = np.iinfo(np.int32).max


def check_whole(least: int, **numbers: Any) -> None:
    """Check that numbers are whole and large enough.

    Raises:
      ConfigurationError: one is not.

    >>> check_whole(1, hubs=2, batch_size=0)
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: batch_size must be at least 1, got 0
    """
    for name, value in numbers.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ConfigurationError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            bound = "not be negative" if least == 0 else f"be at least {least}"
            raise ConfigurationError(f"{name} must {bound}, got {value}")


def check_memory(what: str, size: int) -> None:
    """Check that some bytes fit into the memory of this machine, which an array may not show.

    Raises:
      ConfigurationError: they do not.

    >>> check_memory("batches of 8 steps", 2**10)
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ConfigurationError(
            f"{what} need {size / 2**30:,.1f} GiB and this machine has {memory / 2**30:,.1f} GiB; "
            "ask for fewer steps at once"
        )


def check_name(what: str, name: Any) -> None:
    """Check that the name of something is a text of a sensible length.

    >>> check_name("a partition", None)
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: a partition is given by its name, got NoneType
    """
    if not isinstance(name, str):
        raise ConfigurationError(f"{what} is given by its name, got {type(name).__name__}")
    if len(name) > _LONGEST_NAME:
        raise ConfigurationError(
            f"the name of {what} has {_LONGEST_NAME} characters at most, got {len(name):,}"
        )


def check_count(examples: Any) -> None:
    """Check a number of examples, whose numbers are int32.

    >>> check_count(60_000)
    """
    check_whole(0, examples=examples)
    if examples > _LARGEST:
        raise ConfigurationError(f"there may be {_LARGEST:,} examples at most, got {examples:,}")


def labels_of(targets: Any) -> Any:
    """The targets of a partition as an array [examples, ...].

    Raises:
      ConfigurationError: they are not one target for each example, of numbers or of names.

    >>> labels_of([1, 0]).tolist()
    [1, 0]
    """
    labels = np.asarray(targets)
    if not labels.ndim or labels.dtype.kind not in "biufUS":
        raise ConfigurationError(
            "the targets of a partition must be an array [examples] of labels, got "
            f"{labels.dtype}{list(labels.shape)}"
        )
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise ConfigurationError("the targets of a partition hold a NaN, which has no order")
    return labels


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


def check_examples(name: str, examples: Mapping[str, Any], classes: int) -> None:
    """Check that a dataset has the classes that it says, and no number that is not finite.

    Args:
      name: the dataset's.
      examples: {"inputs": [n, ...], "targets": [n]}, or of sequences {"inputs": tokens [n, length],
        "targets": [n, length]}; either may be absent.
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
    tokens = examples.get("inputs") if labels is not None and labels.ndim > 1 else None
    for what, values in {"labels": labels, "tokens": tokens}.items():
        if values is not None and values.size and not 0 <= values.min() <= values.max() < classes:
            raise ConfigurationError(
                f"the {what} of {name} go from {values.min()} to {values.max()}, and it has "
                f"{classes} classes"
            )
    for key, values in examples.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            number = np.argwhere(~np.isfinite(values))[0][0]
            raise ConfigurationError(
                f"the {key} of {name} are not all finite: example {number} has a NaN or an infinity"
            )
