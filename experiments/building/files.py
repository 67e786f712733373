"""Files and folders that a user names, checked before they are used."""

import os
import re
from pathlib import Path

from jaxlocal import ConfigurationError

LARGEST = 1 << 20  # bytes of a file of flags or settings


def short(text: object, length: int = 100) -> str:
    """A text in at most so many printable characters.

    >>> short("a" * 20, 9), short("line\\n")
    ('aaaa…aaaa', 'line?')
    """
    shown = "".join(c if c.isprintable() else "?" for c in str(text))
    half = length // 2
    return shown if len(shown) <= length else f"{shown[:half]}…{shown[-half:]}"


def local_path(flag: str, value: str | Path) -> Path:
    """The path of a file or folder of this machine; `~` is the home folder.

    Raises:
      ConfigurationError: an address such as gs://…, an unknown home folder, or characters that no
        path should have, such as a newline.
    """
    text = str(value)
    if not text or not text.isprintable():
        raise ConfigurationError(f"{flag} must be a path in printable characters, got {text!r:.99}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ConfigurationError(
            f"{flag}={short(text)} is not on this machine: give a local folder, or mount it"
        )
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ConfigurationError(f"{flag}={short(text)}: there is no such home folder")
    return Path(path)


def read_text(path: Path, what: str) -> str:
    """The text of a small file.

    Args:
      what: of the file in errors, such as "the flag file".

    Raises:
      ConfigurationError: it is missing, no file, too large, or no text.
    """
    name = f"{what} {short(path)}"
    try:
        special = path.exists() and not path.is_file()  # reading a pipe or a device may never end
        data = b"" if special else _beginning(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigurationError(f"{name} cannot be read: {why}") from None
    if special:
        raise ConfigurationError(f"{name} is not a file")
    if len(data) > LARGEST:
        raise ConfigurationError(f"{name} is larger than {LARGEST} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{name} is not text: byte {error.start} is no UTF-8") from None


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LARGEST + 1)
