"""What can fail where runs are written and read, in one sentence and on all processes alike."""

import contextlib
import importlib.util
import itertools
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlocal.errors import ConfigurationError

_LONGEST = 256  # bytes of a problem that processes exchange

# What the operating system says, and what helps.
_ADVICE = {
    "No space left": "free space there, then try again",
    "quota": "free space there, then try again",
    "File too large": "allow larger files, then try again",
    "Permission denied": "allow writing there, then try again",
    "Read-only file system": "allow writing there, then try again",
}

# What an error says that is about the machine, and not about what was to be read.
_OF_MACHINE = (
    "Permission denied",
    "Too many open files",
    "Cannot allocate memory",
    "out of memory",
)


class SavingError(RuntimeError):
    """A checkpoint or a model could not be written; earlier ones are intact."""


def local_folder(folder: str | Path) -> Path:
    """The absolute path of a folder, with ~ as the home folder.

    Raises:
      ConfigurationError: it is a URL, or cannot be a path.

    >>> local_folder("gs://bucket/run")
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: 'gs://bucket/run' is not a folder of this machine, in which
    checkpoints and models are written
    """
    if "://" in str(folder) or "\0" in str(folder):
        raise ConfigurationError(
            f"{str(folder)!r} is not a folder of this machine, in which checkpoints and models are "
            f"written"
        )
    return Path(folder).expanduser().absolute()


def free_path(path: Path) -> Path:
    """The path, or with a number the first that is free; one of a link to nothing is not."""
    paths = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], paths) if not os.path.lexists(one))


def remove_unfinished(folder: Path) -> None:
    """Remove checkpoints that a process which was killed did not finish."""
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
        if jax.process_index() == 0 and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def cause(error: BaseException) -> str:
    """The root cause of an error in one line; of a long text, the end, where TensorStore has it."""
    error = _root(error)
    text = " ".join(str(error).split()).split(" [tensorstore_spec")[0]
    return ("…" + text[-160:] if len(text) > 160 else text) or type(error).__name__


def advice(error: BaseException) -> str:
    """What helps against an error, as the end of a sentence; "" if that is not known.

    >>> advice(OSError(28, "No space left on device"))
    '; free space there, then try again'
    """
    text: str = cause(error)
    return next((f"; {helps}" for said, helps in _ADVICE.items() if said in text), "")


def of_machine(error: BaseException) -> bool:
    """Whether an error of reading says nothing about what was to be read: another user or a machine
    with more memory may read it.

    >>> of_machine(OSError(13, "Permission denied")), of_machine(ValueError("line 1 column 1"))
    (True, False)
    """
    error = _root(error)
    text = str(error).replace("Out of memory", "out of memory")  # as jaxlib writes it
    return isinstance(error, MemoryError) or any(said in text for said in _OF_MACHINE)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def agreed(problem: str) -> str:
    """The problem of the first process that has one, on all processes; "" if none has one."""
    if jax.process_count() == 1:
        return problem
    own = np.zeros(_LONGEST, np.uint8)
    text = problem.encode()[:_LONGEST]
    own[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = multihost_utils.process_allgather(own)
    texts = [bytes(one).rstrip(b"\0").decode(errors="ignore") for one in np.asarray(everyone)]
    return next(filter(None, texts), "")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Read with Orbax without what it leaves to print to others where reading fails.

    asyncio logs each task that nobody waits for, and Python each callback of a closed event loop
    and each coroutine that never ran.
    """
    asyncio, before = logging.getLogger("asyncio"), sys.unraisablehook
    hook = lambda ignored: isinstance(ignored.exc_value, Exception) or before(ignored)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* was never awaited", RuntimeWarning)
        asyncio.disabled, sys.unraisablehook = True, hook
        try:
            yield
        finally:
            asyncio.disabled, sys.unraisablehook = False, before


def require(package: str, what: str) -> None:
    """Raise an error that names what to install, if a package is not installed.

    >>> require("numpy", "checkpoints")
    >>> require("orrbax", "checkpoints")
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: checkpoints need orrbax, which is not installed:
    pip install 'jaxlocal[experiments]'
    """
    if not importlib.util.find_spec(package):
        raise ConfigurationError(
            f"{what} need {package}, which is not installed: pip install 'jaxlocal[experiments]'"
        )
