"""Settings of runs to compare: a file with a line of flags for each."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.building.config import Config
from experiments.building.files import local_path, read_text
from experiments.launching.command_line import define_flags
from experiments.launching.flag_files import check_flag_files
from jaxlocal import ConfigurationError

# Flags that a setting may not have: they are the same for all settings, or searched for.
SHARED = ("learning_rate", "seed", "seeds", "workdir")


def read_settings(path: Path, base: Config) -> dict[str, Config]:
    """Read the configs of a settings file, by their names.

    A line is `NAME: --flag=value --flag=value`: the base with other flags. The name is also the
    name of a folder. Empty lines are skipped, and comments, which begin with #.

    Raises:
      ConfigurationError: a file that cannot be read, a line without a setting, a name that is
        given twice, an unknown flag, or one that all settings share.
    """
    lines = read_text(local_path("--settings", path), "the settings file").splitlines()
    settings: dict[str, Config] = {}
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        name, colon, chosen = line.partition(":")
        if not colon or not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigurationError(
                f"{path} line {number} is not a setting such as 'NAME: --flag=value': {line!r}"
            )
        if name in settings:
            raise ConfigurationError(f"{path} has two settings named {name}, one in line {number}")
        settings[name] = _with_own_flags(base, chosen, f"setting {name}")
    if not settings:
        raise ConfigurationError(f"{path} has no setting, such as 'NAME: --flag=value'")
    return settings


def _with_own_flags(base: Config, text: str, where: str) -> Config:
    """The base config with the flags of a line."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigurationError(f"{where}: {error}") from None
    return with_flags(base, words, where, SHARED)


def with_flags(base: Config, words: list[str], where: str, shared: Sequence[str] = ()) -> Config:
    """A config with other flags.

    Args:
      base: of the flags that are not given.
      words: of a command line, such as "--workers=4".
      where: names the words in errors.
      shared: flags that may not be given.

    Raises:
      ConfigurationError: an unknown flag, a value of another type, or a shared flag.
    """
    values = flags.FlagValues()
    define_flags(values)
    try:
        check_flag_files(words)
        rest = values([where, *words])[1:]
    except flags.Error as error:
        raise ConfigurationError(f"{where}: {error}") from None
    if rest:
        raise ConfigurationError(
            f"{where}: unexpected argument {rest[0]!r}; flags look like --name=value"
        )
    fields = [field.name for field in dataclasses.fields(Config)]
    chosen: dict[str, Any] = {name: values[name].value for name in fields if values[name].present}
    for name in shared:
        if name in chosen:
            raise ConfigurationError(
                f"{where}: --{name}={chosen[name]} is the same for all settings"
            )
    return dataclasses.replace(base, **chosen)
