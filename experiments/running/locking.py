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

LOCK = "lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Keep other processes from writing a folder, in this context; it is created if it is missing.

    It gives a function that raises `Failure` where the folder or its lock was removed or replaced
    since then, so that another run may be there.

    The operating system holds the lock and releases it however this process ends, so no lock is
    left by a process that was killed. The file names its holder. Of the processes of one run, the
    first holds it for all.

    Raises:
      ConfigurationError: another process holds the lock, or the folder cannot be written.
      Failure: the disk is full.
    """
    if jax.process_index():
        yield lambda: None
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind: type[Exception] = Failure if full else ConfigurationError
        raise kind(f"the workdir {short(folder)} cannot be written: {error.strerror}") from None
    try:
        if not _take(number, folder):
            holder = short(os.read(number, 300).decode(errors="replace").strip())
            raise ConfigurationError(
                f"the workdir {folder} is in use by {holder or 'another process'}; wait until it "
                f"has ended, or give another --workdir"
            )
        with contextlib.suppress(OSError):  # a full disk: the lock is held all the same
            os.ftruncate(number, 0)
            os.write(number, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield lambda: _check_held(number, folder)
    finally:
        os.close(number)


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
