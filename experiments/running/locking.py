"""The lock of a folder: no two runs write one folder at once."""

import contextlib
import errno
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from experiments.building.files import short
from experiments.launching.statuses import Failure
from jaxlocal import ConfigurationError

LOCK, HOLDER = "lock", "process "


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Keep other processes from writing a folder, in this context; it is created if it is missing.

    It gives a function that raises `Failure` where the folder or its lock was removed or replaced
    since then, so that another run may be there.

    The operating system holds the lock and releases it however this process ends, so no lock is
    left by a process that was killed. The file names its holder. Of the processes of one run, the
    first holds it for all.

    Raises:
      ConfigurationError: another process holds the lock, the folder cannot be written, or it has a
        file of another program in the place of the lock.
      Failure: the disk is full.
    """
    if jax.process_index():
        yield lambda: None
        return
    number = _open(folder)
    try:
        _acquire(number, folder)
        with contextlib.suppress(OSError):  # a full disk: the lock is held all the same
            os.ftruncate(number, 0)
            os.lseek(number, 0, os.SEEK_SET)
            os.write(number, f"{HOLDER}{os.getpid()} on {socket.gethostname()}\n".encode())
        yield lambda: _check_held(number, folder)
    finally:
        os.close(number)


def _open(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        no_link = getattr(os, "O_NOFOLLOW", 0)  # the target of a link would be overwritten
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | no_link, 0o666)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind: type[Exception] = Failure if full else ConfigurationError
        raise kind(f"the workdir {short(folder)} cannot be written: {error.strerror}") from None


def _acquire(number: int, folder: Path) -> None:
    """Take the lock, or raise ConfigurationError with what is in its place."""
    taken, text = _take(number, folder), os.read(number, 300).decode(errors="replace").strip("\0\n")
    if not taken:
        raise ConfigurationError(
            f"the workdir {folder} is in use by {short(text) or 'another process'}; wait until it "
            f"has ended, or give another --workdir"
        )
    if text and not text.startswith(HOLDER):
        raise ConfigurationError(
            f"the workdir {short(folder)} holds a file {LOCK!r} that is not of this program; give "
            f"another --workdir"
        )


def _check_held(number: int, folder: Path) -> None:
    try:
        same = os.path.samestat(os.fstat(number), os.stat(folder / LOCK))
    except FileNotFoundError:
        same = False
    if not same:
        raise Failure(
            f"{short(folder)} or the file {LOCK!r} in it was removed or replaced while this run "
            f"was there"
        )


def _take(number: int, folder: Path) -> bool:
    """Take the lock of an open file; returns whether this process has it now.

    A file system that has no locks is used without, with a warning.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(number, 1 << 30, os.SEEK_SET)  # beyond the text, which others read
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
            os.lseek(number, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror}): start no second run in it",
            stacklevel=2,
        )
    return True
