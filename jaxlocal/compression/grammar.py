"""From a word such as `top_k:64:tensor` to the call that it stands for."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxlocal.errors import ConfigurationError, lookup


class Argument(NamedTuple):
    """One argument of a word: what it is called, how it is read, and an example of it."""

    what: str
    read: Callable[[str], Any]
    example: str
    optional: bool = False


class Entry(NamedTuple):
    """What a name stands for."""

    make: Callable
    arguments: tuple[Argument, ...] = ()


def call(what: str, spec: str, table: Mapping[str, Entry], **options: Any) -> Any:
    """What the word NAME[:ARG[:OPTION]] makes; `what` says in an error what it should have been.

    >>> table = {"pair": Entry(lambda a, b=0: (a, b), (Argument("an integer", int, "3"),) * 2)}
    >>> call("thing", "pair:1:2", table)
    (1, 2)
    """
    name, *texts = spec.split(":")
    make, arguments = lookup(what, name, table)
    needed = [a for a in arguments if not a.optional]
    if len(texts) > len(arguments):
        takes = " and ".join(a.what for a in arguments) or "no argument"
        raise ConfigurationError(f"{name} takes {takes}, got {spec!r}")
    if len(texts) < len(needed):
        example = ":".join([name, *(a.example for a in needed)])
        missing = needed[len(texts)].what
        raise ConfigurationError(f"{name} needs {missing}, as in {example}, got {spec!r}")
    values = [_read(spec, name, a, text) for a, text in zip(arguments, texts, strict=False)]
    return make(*values, **options)


def _read(spec: str, name: str, argument: Argument, text: str) -> Any:
    try:
        return argument.read(text)
    except ValueError:
        raise ConfigurationError(
            f"{name} needs {argument.what}, as in {name}:{argument.example}, got {spec!r}"
        ) from None
