"""Call the binaries with command lines, in this interpreter or in a new one.

A new interpreter starts Python, JAX and its devices, which takes seconds. `call` executes the same
module as `__main__` with the same parser of flags, and restores what the binary changes in the
interpreter; only the devices are those of the tests. `test_new_interpreters.py` compares the two.
"""

import contextlib
import faulthandler
import io
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from absl import logging
from absl.testing import flagsaver

ROOT = Path(__file__).parents[2]
SILENT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
TIMEOUT = 300  # seconds, after which a binary has hung


class Called(NamedTuple):
    """The exit status of a binary and what it printed."""

    status: int
    out: str
    error: str


def call(module: str, *arguments: object) -> Called:
    """Run `python -m experiments.MODULE ARGUMENTS` in this interpreter."""
    out, error, status = io.StringIO(), io.StringIO(), None
    name = f"experiments.{module}"
    with (
        _restored(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        mock.patch.object(sys, "argv", [name, *map(str, arguments)]),
    ):
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            status = ended.code
    return Called(int(status or 0), out.getvalue(), error.getvalue())


def call_new(module: str, *arguments: object, **environment: str) -> Called:
    """Run `python -m experiments.MODULE ARGUMENTS` in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    return Called(done.returncode, done.stdout, done.stderr)


def one_sentence(error: str) -> bool:
    """Whether an error is reported in one line, as a user should see it."""
    return error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1


@contextlib.contextmanager
def _restored():
    """Restore the flags, environment, hooks, warnings and loggers that a binary changes."""
    root = logging.logging.root
    handlers, level, verbosity = root.handlers[:], root.level, logging.get_verbosity()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(mock.patch.object(os, "_exit", sys.exit))
        stack.enter_context(mock.patch.object(faulthandler, "enable"))  # which pytest has done
        stack.enter_context(mock.patch.object(sys, "unraisablehook", sys.unraisablehook))
        stack.enter_context(warnings.catch_warnings())
        warnings.resetwarnings()  # as a new interpreter has them
        for category in SILENT:
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", module="runpy")  # the module has been imported before
        stack.callback(root.setLevel, level)
        stack.callback(root.handlers.__setitem__, slice(None), handlers)
        stack.callback(logging.set_verbosity, verbosity)
        stack.enter_context(flagsaver.flagsaver())
        yield
