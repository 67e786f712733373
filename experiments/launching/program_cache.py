"""The compilation cache, which keeps compiled programs for later runs."""

import contextlib
import glob
import itertools
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

LIMIT = 1 << 30  # bytes of programs that a run finds


def keep_programs() -> None:
    """Keep compiled programs for later runs, up to a limit; warn where they cannot be kept."""
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        folder = cache_folder()
        folder.mkdir(
            0o700, parents=True, exist_ok=True
        )  # programs from it are run, so no other user may write it
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "it cannot be written", str(folder))
        forget_the_oldest(folder, LIMIT)
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder is unknown
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        warnings.warn(f"compiled programs are not kept: {why}", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def cache_folder() -> Path:
    """The folder of compiled programs among the caches of the user."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "jaxlocal"


def forget_the_oldest(folder: Path, limit: int) -> None:
    """Delete the programs that were used least recently, until the rest fits the limit in bytes."""
    used = sorted(
        ((max(s.st_atime, s.st_mtime), s.st_size, entry) for entry, s in _entries(folder)),
        reverse=True,
    )
    for (_, _, entry), total in zip(used, itertools.accumulate(u[1] for u in used), strict=True):
        if total > limit:
            entry.unlink(missing_ok=True)


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for entry in folder.glob("*-cache"):
        try:
            yield entry, entry.stat()
        except FileNotFoundError:  # another process has deleted it
            continue


class CacheWarnings:
    """Show JAX's warnings of a failing compilation cache once, not once for every program."""

    WARNING = re.compile(
        r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)", re.DOTALL
    )

    def __init__(self):
        self._shown = False

    def __call__(self, sentence: str) -> str | None:
        """The sentence to show, if any; deletes an entry that is damaged or half written."""
        found = self.WARNING.match(sentence)
        folder = jax.config.values["jax_compilation_cache_dir"]
        if not (found and folder):
            return sentence
        doing, program, why = found.groups()
        with contextlib.suppress(OSError):  # a folder that cannot be written
            for entry in Path(folder).glob(f"{glob.escape(program)}-*-cache"):
                entry.unlink(missing_ok=True)
        first, self._shown = not self._shown, True
        shown = f"{doing} compiled programs in {folder} failed, the run continues: {why}"
        return shown if first else None
