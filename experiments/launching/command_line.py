"""Run a command: from the command line to a config, and from an error to one sentence and an exit
status."""

import dataclasses
import faulthandler
import gc
import os
import sys
import textwrap
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from absl import flags, logging
from absl.flags import FLAGS

from experiments.building.config import Config
from experiments.building.files import local_path, short
from experiments.launching.flag_files import check_flag_files
from experiments.launching.program_cache import CacheWarnings
from experiments.launching.starting import ABOUT
from experiments.launching.statuses import INTERRUPTED, TERMINATED, explained
from experiments.launching.stopping import Interrupted
from jaxlocal import ConfigurationError

PATHS = ("workdir", "data_dir")
HELP = {"-h", "--help", "-help", "--helpfull", "--helpshort"}


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Register a flag for every field of `Config`."""
    define: dict[type, Callable] = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
        bool: flags.DEFINE_bool,
    }
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        hint, text = hints[field.name], field.metadata["help"]
        kind = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
        define[kind](field.name, field.default, text, flag_values=values)


def from_flags(values: flags.FlagValues = FLAGS) -> Config:
    """The config that the flags describe; `~` in a path is the home folder.

    Raises:
      ConfigurationError: a path that is not on this machine, or that no path should be.
    """
    chosen: dict[str, Any] = {f.name: values[f.name].value for f in dataclasses.fields(Config)}
    for name in PATHS:
        if chosen[name] is not None:
            chosen[name] = str(local_path(f"--{name}", chosen[name]))
    return Config(**chosen)


def config_help(about: str | None) -> str:
    """Help for a command that takes the flags of `Config`: what it does, and the flags by group."""
    lines = [(about or "").strip(), "", "Flags; --flagfile=FILE reads more of them from a file:"]
    group = None
    for field in dataclasses.fields(Config):
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines += ["", f"{group}:"]
        default = "" if field.default is None else f" [{field.default}]"
        text = field.metadata["help"] + default
        lines += textwrap.wrap(
            text, 100, initial_indent=f"  --{field.name}: ", subsequent_indent="      "
        )
    return "\n".join([*lines, "", ABOUT])


def run_command(main: Callable[..., int], about: str | None, operands: bool = False) -> NoReturn:
    """Parse the command line, run main, and end the process with the exit status that it returns.

    A mistake of the user ends in one sentence and exit status 2, a failure of the machine in one
    sentence and exit status 1. An error that is a fault of the program raises.

    Args:
      main: takes the arguments that are not flags.
      about: what `--help` prints above the flags that the command defines.
      operands: whether there may be arguments that are not flags.
    """
    if not gc.isenabled():  # since the command began
        gc.freeze()  # what was imported stays
        gc.enable()
    logging.use_absl_handler()
    faulthandler.enable()
    sys.unraisablehook = _handle_ignored
    shown = CacheWarnings()
    warnings.showwarning = lambda message, *_, **__: _warn(shown(str(message)))
    try:
        status = main(*_parse(sys.argv, about or "", operands))
    except (Exception, KeyboardInterrupt) as error:
        known = explained(error)
        if known is None:
            raise
        status = _report(*known)
    if status in (INTERRUPTED, TERMINATED):
        sys.stdout.flush()
        os._exit(status)  # a compilation in a background thread would crash at a regular exit
    sys.exit(status)


def _parse(argv: list[str], about: str, operands: bool) -> list[str]:
    """Parse the flags, or print help and exit; return the arguments that are not flags."""
    if HELP & set(argv[1:]):
        print(about.strip() + _own_flags())
        sys.exit(0)
    check_flag_files(argv[1:])
    try:
        rest = FLAGS(argv)[1:]
    except flags.Error as error:
        raise ConfigurationError(str(error).removeprefix("ERROR:: ")) from None
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # the log messages of libraries are noise here
    if rest and not operands:
        raise ConfigurationError(f"unexpected argument {rest[0]!r}; flags look like --name=value")
    return rest


def _own_flags() -> str:
    own = FLAGS.get_key_flags_for_module(sys.modules["__main__"].__file__ or "")
    shown = {flag.name: "" if flag.default is None else f" [{flag.default}]" for flag in own}
    lines = [f"  --{flag.name}: {flag.help}{shown[flag.name]}" for flag in own]
    return "\n\nFlags of this command:\n" + "\n".join(lines) if lines else ""


def _handle_ignored(unraisable: Any) -> None:
    """Handle an error that Python ignores, since it was raised in a callback."""
    if isinstance(unraisable.exc_value, Interrupted):
        # A signal during JAX's callback of the garbage collector.
        os._exit(_report(*explained(unraisable.exc_value) or ("interrupted", INTERRUPTED)))
    elif str(unraisable.exc_value) != "Event loop is closed":
        # After a failed write TensorStore calls the event loop that Orbax has closed.
        sys.__unraisablehook__(unraisable)


def _warn(sentence: str | None) -> None:
    """Print a warning without the place in the code that it comes from."""
    if sentence:
        print("warning: " + " ".join(sentence.split()), file=sys.stderr, flush=True)


def _report(sentence: str, status: int) -> int:
    """Print an error on one line; return the exit status."""
    print("error: " + short(" ".join(sentence.split()), 1000), file=sys.stderr, flush=True)
    return status
