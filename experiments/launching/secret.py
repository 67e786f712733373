"""The secret by which the processes of one run know each other."""

import contextlib
import os
import re
import secrets
import time
from pathlib import Path
from typing import NamedTuple

from jaxlocal import ConfigurationError

VARIABLE = "JAXLOCAL_SECRET"
FILE = ".secret"
LEAST = 16  # characters of a secret that the user sets
HINT = (
    f"all processes need the same {VARIABLE}, or none of them and one --workdir that they all share"
)


class Secret(NamedTuple):
    """A secret, and where it comes from."""

    value: bytes
    source: str


def shared_secret(folder: Path, patience: float) -> Secret:
    """The secret of a run: `JAXLOCAL_SECRET`, or else that of a file in a folder that all processes
    share, where the first process writes it.

    Args:
      patience: seconds to wait for a file that another process is writing.

    Raises:
      ConfigurationError: the variable is short, or the file can be neither read nor written.
    """
    if given := os.environ.get(VARIABLE):
        if len(given) < LEAST:
            raise ConfigurationError(
                f"{VARIABLE} must have at least {LEAST} characters, got {len(given)}"
            )
        return Secret(os.fsencode(given), VARIABLE)
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            _write(path)
        return Secret(_read(path, time.monotonic() + patience), str(path))
    except FileExistsError:
        raise ConfigurationError(f"the workdir {folder} is a file") from None
    except (OSError, ValueError) as error:  # a path with NUL is a ValueError
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(f"the secret of the run, {path}: {why}; {HINT}") from None


def _write(path: Path) -> None:
    number = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with open(number, "w") as file:
            file.write(secrets.token_hex(32))
    except OSError:  # a full disk: an empty file would keep the next run waiting
        path.unlink(missing_ok=True)
        raise


def _read(path: Path, until: float) -> bytes:
    """The secret of a file, once the process that writes it has done so; on a network file system
    the file may appear late."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            held = path.read_bytes()
            if re.fullmatch(b"[0-9a-f]{64}", held):
                return held
            if len(held) >= 64:
                raise ValueError("it holds something else; delete it")
        if time.monotonic() > until:
            raise ValueError("another process has not written it; delete it")
        time.sleep(0.05)
