"""What a user's mistake raises, and the sentence that names what is near to an unknown name."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class ConfigurationError(ValueError):
    """A mistake in what the user asked for, found at build time, told in one sentence with both
    values."""


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigurationError:
    """The error for a name that is not among the known ones, with the nearest of them.

    >>> str(unknown("method", "local_sdg", ["local_sgd", "mll_sgd"]))
    "unknown method 'local_sdg'; did you mean 'local_sgd' or 'mll_sgd'? known: local_sgd, mll_sgd"
    """
    known = list(known)
    begins = [n for n in known if n.startswith(name)]
    matches = difflib.get_close_matches(name, known, n=2) or begins
    near = " or ".join(map(repr, matches)) if name else ""
    hint = f"; did you mean {near}?" if near else ";"
    return ConfigurationError(f"unknown {what} {name!r}{hint} known: {', '.join(known)}")


def lookup(what: str, name: str, table: Mapping[str, T]) -> T:
    """table[name], or the error that names what is near."""
    if name not in table:
        raise unknown(what, name, table)
    return table[name]
