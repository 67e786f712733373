"""The grammar of spec strings such as `top_k:64:tensor`, and what a spec string builds."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxlocal.errors import ConfigurationError, lookup


class Argument(NamedTuple):
    """One argument of a spec string."""

    description: str  # with its article, for error messages: "a ratio"
    read: Callable[[str], Any]  # text -> value, or ValueError
    example: str
    optional: bool = False


class Entry(NamedTuple):
    """What a name builds, and the arguments that follow it."""

    make: Callable
    arguments: tuple[Argument, ...] = ()


def build(kind: str, spec: str, table: Mapping[str, Entry], **options: Any) -> Any:
    """Build what the spec string NAME[:ARGUMENT[:OPTION]] describes.

    Args:
      kind: what the spec string describes, for error messages.
      spec: the spec string.
      table: the entry of every known name.
      **options: keyword arguments that do not stand in the spec string.

    Returns:
      What the entry's `make` returns.

    Raises:
      ConfigurationError: not a string, an unknown name, or an argument that is missing,
        superfluous or unreadable.

    >>> table = {"pair": Entry(lambda a, b=0: (a, b), (Argument("an integer", int, "3"),) * 2)}
    >>> build("thing", "pair:1:2", table)
    (1, 2)
    """
    check_text(kind, spec)
    name, *texts = spec.split(":")
    make, arguments = lookup(kind, name, table)
    needed = [a for a in arguments if not a.optional]
    if len(texts) > len(arguments):
        takes = " and ".join(a.description for a in arguments) or "no argument"
        raise ConfigurationError(f"{name} takes {takes}, got {spec!r}")
    if len(texts) < len(needed):
        example = ":".join([name, *(a.example for a in needed)])
        missing = needed[len(texts)].description
        raise ConfigurationError(f"{name} needs {missing}, as in {example}, got {spec!r}")
    values = [_read(spec, name, a, text) for a, text in zip(arguments, texts, strict=False)]
    return make(*values, **options)


def check_text(kind: str, spec: Any) -> None:
    """Raise ConfigurationError where a spec string is not a string."""
    if not isinstance(spec, str):
        raise ConfigurationError(f"the spec string of a {kind} must be a string, got {spec!r}")


def _read(spec: str, name: str, argument: Argument, text: str) -> Any:
    try:
        if re.search(r"[\s_]|[^\x00-\x7f]", text):  # in which Python's numbers are written too
            raise ValueError(text)
        return argument.read(text)
    except ValueError:
        raise ConfigurationError(
            f"{name} needs {argument.description}, as in {name}:{argument.example}, got {spec!r}"
        ) from None
