"""Check the flag files of a command line before absl reads them, which it does without limit."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from experiments.building.files import read_text
from jaxlocal import ConfigurationError

OPTIONS = ("--flagfile", "-flagfile")


def check_flag_files(words: Sequence[str]) -> None:
    """Check the files of `--flagfile` on a command line, and those that these name.

    Raises:
      ConfigurationError: a file that cannot be read, that is no text, or that includes itself.
    """
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word == "--":
            return
        option, equals, name = word.partition("=")
        if option in OPTIONS:
            _check(name if equals else following, ())


def _check(name: str, including: tuple[str, ...]) -> None:
    path = os.path.expanduser(name.strip())
    if not path:
        return
    text = read_text(Path(path), "the flag file")
    real = os.path.realpath(path)
    if real in including:
        raise ConfigurationError(f"the flag file {path} includes itself")
    for line in text.splitlines():
        option, equals, other = line.partition("=")
        if equals and option in OPTIONS:
            _check(other, (*including, real))
