"""From epochs to steps."""

import dataclasses
from typing import Any

from experiments.building.config import Config
from jaxlocal import ConfigurationError
from jaxlocal.methods import METHODS

# Flags in epochs, and those in steps that they replace.
IN_STEPS = {"epochs": "steps", "warmup_epochs": "warmup_steps", "decay_epochs": "decay_steps"}


def steps_of_epoch(config: Config, train_examples: int) -> int:
    """Steps in which the workers together take each example about once."""
    return train_examples // (config.workers * config.batch_size)


def in_steps(config: Config, epoch: int | None) -> Config:
    """The config with steps in place of epochs.

    Args:
      epoch: the steps of an epoch; None without a dataset.

    Raises:
      ConfigurationError: there are no epochs, or a length is given in epochs and in steps.
    """
    given = {name: getattr(config, name) for name in IN_STEPS if getattr(config, name) is not None}
    for name, value in given.items():
        if epoch is None:
            raise ConfigurationError(
                f"--{name}={value} needs a dataset, and --parameters plans without one; give "
                f"--{IN_STEPS[name]}"
            )
        if epoch < 1:
            raise ConfigurationError(
                f"--{name}={value} has no epochs to count: {config.workers} workers × "
                f"{config.batch_size} examples are more than the training set"
            )
        _check_given_once(config, name)
    if not given:
        return config
    changes: dict[str, Any] = dict.fromkeys(given)
    for name in given:
        changes[IN_STEPS[name]] = _counted(config, name, epoch or 0)
    return dataclasses.replace(config, **changes)


def _check_given_once(config: Config, name: str) -> None:
    others = [IN_STEPS[name]] + ["rounds"] * (name == "epochs")
    for other in others:
        if getattr(config, other) not in (None, 0):
            raise ConfigurationError(
                f"give --{name} or --{other}, not both: {getattr(config, name)} and "
                f"{getattr(config, other)}"
            )


def _counted(config: Config, name: str, epoch: int) -> int | str:
    """The steps of a flag in epochs."""
    value = getattr(config, name)
    if name == "decay_epochs":
        return ",".join(str(round(at * epoch)) for at in numbers_of(name, value))
    steps = round(value * epoch)
    if name == "warmup_epochs":
        return steps
    whole = config.local_steps if METHODS[config.method].network == "hubs" else 1
    return max(whole, steps - steps % whole)


def numbers_of(name: str, text: str) -> list[float]:
    """The numbers of a flag, which ascend and are more than 0.

    >>> numbers_of("decay_epochs", "60,120,160")
    [60.0, 120.0, 160.0]
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [0.0]
    ascend = all(a < b for a, b in zip([0.0, *values], [*values, float("inf")], strict=True))
    if not ascend:
        raise ConfigurationError(
            f"--{name} must be ascending numbers > 0 separated by commas, got {text!r:.99}"
        )
    return values
