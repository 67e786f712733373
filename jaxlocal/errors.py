"""What a user's mistake raises, and the sentence that names what is near to an unknown name."""

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class ConfigurationError(ValueError):
    """A user's mistake, found when things are built: one sentence with both values."""


class ArgumentError(ConfigurationError, TypeError):
    """An argument that a function does not take."""


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigurationError:
    """The error for a name that is not among the known ones, with the nearest of them.

    >>> str(unknown("method", "local_sdg", ["local_sgd", "mll_sgd"]))
    "unknown method 'local_sdg'; did you mean 'local_sgd' or 'mll_sgd'? known: local_sgd, mll_sgd"
    """
    return ConfigurationError(_sentence(what, name, list(known)))


def lookup(what: str, name: str, table: Mapping[str, T]) -> T:
    """table[name], or the error that names what is near.

    >>> lookup("size", "two", {"one": 1, "two": 2})
    2
    """
    if not isinstance(name, str) or name not in table:
        raise unknown(what, name, table)
    return table[name]


def check_integer(what: str, value: Any, least: int = 1) -> None:
    """Raise ConfigurationError where a value is not an integer of at least a size.

    >>> check_integer("micro-batches", 2.5)
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: micro-batches must be an integer of at least 1, got 2.5
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{what} must be an integer of at least {least}, got {value!r}")


def check_fraction(what: str, value: Any) -> None:
    """Raise ConfigurationError where a value is not a number from 0 to 1.

    >>> check_fraction("the mixing factor", "half")
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: the mixing factor must be in [0, 1], got 'half'
    """
    if not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
        raise ConfigurationError(f"{what} must be in [0, 1], got {value!r}")


def explain_arguments(fn: Callable[P, T]) -> Callable[P, T]:
    """Make a function refuse an argument that it does not take in one sentence, with the nearest.

    >>> @explain_arguments
    ... def local_sgd(grad_fn, optimizer, *, period=1): ...
    >>> local_sgd(None, None, perod=4)
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ArgumentError: unknown argument of local_sgd 'perod'; did you mean 'period'?
    known: grad_fn, optimizer, period
    """
    parameters = inspect.signature(fn).parameters
    by_position = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(fn)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in parameters:
                raise ArgumentError(_sentence(f"argument of {fn.__name__}", name, list(parameters)))
        if len(args) > len(by_position):
            raise ArgumentError(
                f"{fn.__name__} takes {' and '.join(by_position)} by position and all else by "
                f"name, got {len(args)} arguments by position"
            )
        return fn(*args, **kwargs)

    return checked


def _sentence(what: str, name: str, known: list[str]) -> str:
    if not isinstance(name, str):
        return f"unknown {what} {name!r}; known: {', '.join(known)}"
    begins = [n for n in known if n.startswith(name)]
    matches = difflib.get_close_matches(name, known, n=2) or begins
    near = " or ".join(map(repr, matches)) if name else ""
    hint = f"; did you mean {near}?" if near else ";"
    return f"unknown {what} {name!r}{hint} known: {', '.join(known)}"
