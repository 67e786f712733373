"""Settings of runs to compare: a file with a line of flags for each."""

import dataclasses
import re
import shlex
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
        settings[name] = _with_flags(base, chosen, f"setting {name}")
    if not settings:
        raise ConfigurationError(f"{path} has no setting, such as 'NAME: --flag=value'")
    return settings


def _with_flags(base: Config, text: str, where: str) -> Config:
    """The base config with the flags of a line."""
    values = flags.FlagValues()
    define_flags(values)
    try:
        words = shlex.split(text)
        check_flag_files(words)
        rest = values([where, *words])[1:]
    except (flags.Error, ValueError) as error:
        raise ConfigurationError(f"{where}: {error}") from None
    if rest:
        raise ConfigurationError(
            f"{where}: unexpected argument {rest[0]!r}; flags look like --name=value"
        )
    chosen: dict[str, Any] = {
        name: values[name].value for name in _fields() if values[name].present
    }
    for name in SHARED:
        if name in chosen:
            raise ConfigurationError(
                f"{where}: --{name}={chosen[name]} is the same for all settings"
            )
    return dataclasses.replace(base, **chosen)


def _fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Config)]
