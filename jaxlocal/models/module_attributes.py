"""Python attributes of an NNX module that would make its outputs depend on more than its arrays."""

import gc
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
from flax import nnx

from jaxlocal.errors import ConfigurationError

_DEPTH = 3  # from a function over its tuple of cells to what a cell holds


def numbers_of(module: nnx.Module) -> dict[str, int | float]:
    """The Python numbers among the attributes of a module and its parts, by name.

    >>> numbers_of(nnx.Dropout(0.5))
    {'rate': 0.5}
    """
    return {name: value for name, value in _attributes(module) if type(value) in (int, float)}


def check_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Check that a call leaves attributes as they are, since the next call starts from the first.

    Args:
      before, after: attributes by name, before and after the call.

    Raises:
      ConfigurationError: an attribute is another one.

    >>> check_unchanged({"calls": 1}, {"calls": 1})
    """
    for name, value in before.items():
        now = after.get(name, value)
        if now is not value and not (type(now) is type(value) and now in (value,)):
            raise ConfigurationError(
                f"a call of the module changes its attribute {name}, and the next call would not "
                "see it: keep what changes in an nnx.Variable, such as nnx.BatchStat"
            )


def check_nothing_hidden(module: nnx.Module) -> None:
    """Check, inside a transformation, that no function among the attributes holds a traced array.

    Raises:
      ConfigurationError: a function holds one, which Flax would not find.

    >>> check_nothing_hidden(nnx.Dropout(0.5))
    """
    for name, value in _attributes(module):
        if callable(value) and not nnx.is_data(value) and _holds_tracer(value, _DEPTH):
            raise ConfigurationError(
                f"the function {name} of the module holds an array that the constructor makes, "
                "where Flax does not find it: keep the array as an attribute of the module"
            )


def _attributes(module: nnx.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of a module and its parts, each with its name below the module."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            for name, value in vars(node).items():
                yield ".".join(map(str, (*path, name))), value


def _holds_tracer(value: Any, depth: int) -> bool:
    if isinstance(value, jax.core.Tracer) or not depth:
        return isinstance(value, jax.core.Tracer)
    held = gc.get_referents(value)
    return any(
        _holds_tracer(x, depth - 1) for x in held if not isinstance(x, type | ModuleType | dict)
    )
