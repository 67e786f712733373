"""From the command line to a config, and from a user's mistake to one sentence and an exit
status."""

import dataclasses
import os
import sys
import textwrap
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from absl.flags import FLAGS

from experiments.building.config import Config
from experiments.launching.program_cache import CacheTrouble
from experiments.launching.starting import ABOUT
from jaxlocal import ConfigurationError
from jaxlocal.data import StreamError
from jaxlocal.training.checkpoints import SavingError

# Exit statuses: what the machine or the training did, a user's mistake, Ctrl-C.
FAILED, USAGE, INTERRUPTED = 1, 2, 130


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Register a flag for every field."""
    define: dict[type, Callable] = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
        bool: flags.DEFINE_bool,
    }
    for field in dataclasses.fields(Config):
        kind, text = field.metadata["kind"], field.metadata["help"]
        define[kind](field.name, field.default, text, flag_values=values)


def from_flags(values: flags.FlagValues = FLAGS) -> Config:
    """The config that the flags hold."""
    chosen: dict[str, Any] = {f.name: values[f.name].value for f in dataclasses.fields(Config)}
    return Config(**chosen)


def help_text(about: str) -> str:
    """The flags by groups."""
    lines = [about.strip(), "", "Flags, of which --flagfile=FILE reads more from a file:"]
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


def run_binary(main: Callable[[Config], int | None], about: str) -> None:
    """Run main on the command line's config.

    A user's mistake ends in one sentence and exit status 2.
    """
    run_tool(lambda: main(from_flags()), lambda: help_text(about))


def run_tool(main: Callable[[], int | None], help_of: Callable[[], str]) -> None:
    """Run a main that reads its flags itself, in the same manner."""
    app.run(lambda _: _guarded(main), flags_parser=lambda argv: _parse(argv, help_of))


def _parse(argv: list[str], help_of: Callable[[], str]) -> list[str]:
    if {"-h", "--help", "-help", "--helpfull", "--helpshort"} & set(argv[1:]):
        print(help_of() + _extra_help())
        sys.exit(0)
    try:
        rest = FLAGS(argv)
    except flags.Error as error:
        fail(str(error))
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # what libraries say of themselves is noise here
    if rest[1:]:
        fail(f"what is {rest[1]!r}? flags look like --name=value")
    return rest


def _guarded(main: Callable[[], int | None]) -> int | None:
    sys.unraisablehook = _without_what_follows_a_failed_write
    shown = CacheTrouble()
    warnings.showwarning = lambda message, *_, **__: _warn(shown(str(message)))
    try:
        status = main()
    except (Exception, KeyboardInterrupt) as error:
        known = explained(error)
        if known is None:
            raise
        status = _say(*known)
    if status == INTERRUPTED:
        sys.stdout.flush()
        os._exit(status)  # a compilation that goes on in the background would crash at exit
    return status


def explained(error: BaseException) -> tuple[str, int] | None:
    """The sentence and the exit status for what may go wrong; None for what must not."""
    if isinstance(error, ConfigurationError):
        return str(error), USAGE
    if isinstance(error, SavingError | StreamError):
        return str(error), FAILED
    if isinstance(error, OSError):
        return f"{error.filename or 'writing'}: {error.strerror}", FAILED
    return ("interrupted", INTERRUPTED) if isinstance(error, KeyboardInterrupt) else None


def _without_what_follows_a_failed_write(unraisable: Any) -> None:
    """After a write that failed TensorStore still calls the event loop that Orbax has closed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _warn(sentence: str | None) -> None:
    """A warning, without the place in the code that it came from."""
    if sentence:
        print("warning: " + " ".join(sentence.split()), file=sys.stderr, flush=True)


def _extra_help() -> str:
    own = FLAGS.get_key_flags_for_module(sys.modules["__main__"].__file__ or "")
    lines = [f"  --{flag.name}: {flag.help} [{flag.default}]" for flag in own]
    return "\n\nthis binary:\n" + "\n".join(lines) if lines else ""


def fail(sentence: str) -> NoReturn:
    """Say what is wrong and end with the status of a user's mistake."""
    sys.exit(_say(sentence, USAGE))


def _say(sentence: str, status: int) -> int:
    print("error: " + " ".join(sentence.split()), file=sys.stderr, flush=True)
    return status
