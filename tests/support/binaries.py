"""Call the binaries with a user's arguments: in this interpreter, which costs no new start of JAX,
or in a new one.

`call` executes the same module as `__main__`, through the same parser of flags, and restores what
the binary has changed in the interpreter. The devices, though, are those of the tests: what depends
on how JAX starts needs `call_new`.
"""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from absl import app, flags, logging
from absl.testing import flagsaver

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds, after which a binary hangs


class Called(NamedTuple):
    """What a binary has left: its exit status and what it printed."""

    status: int
    out: str
    error: str


def call(module: str, *arguments: object) -> Called:
    """Run `python -m experiments.MODULE ARGUMENTS` in this interpreter."""
    out, error, status = io.StringIO(), io.StringIO(), 0
    argv = [f"experiments.{module}", *map(str, arguments)]
    with _as_found(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        with mock.patch.object(sys, "argv", argv):
            try:
                runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
            except SystemExit as ended:
                status = ended.code or 0
    assert isinstance(status, int), status
    return Called(status, out.getvalue(), error.getvalue())


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


@contextlib.contextmanager
def _as_found():
    """Restore the flags, environment, hooks, warnings and loggers that a binary changes."""
    app.define_help_flags()  # which absl does once
    root = logging.logging.root
    handlers, level, verbosity = root.handlers[:], root.level, logging.get_verbosity()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(mock.patch.object(os, "_exit", sys.exit))
        stack.enter_context(mock.patch.object(sys, "unraisablehook", sys.unraisablehook))
        stack.enter_context(warnings.catch_warnings())
        warnings.resetwarnings()
        warnings.simplefilter("default", UserWarning)
        warnings.filterwarnings("ignore", module="runpy")
        with flagsaver.flagsaver():
            logging.use_absl_handler()
            yield
        logging.set_verbosity(verbosity)
        root.handlers[:] = handlers
        root.setLevel(level)
        assert flags.FLAGS.is_parsed() or True
