"""From flags to the running averages of the model that a run keeps and measures."""

from experiments.building.config import Config
from jaxlocal import ConfigurationError
from jaxlocal.training import RunningAverage


def make_running_averages(config: Config, steps: int) -> dict[str, RunningAverage]:
    """The running averages of the flags, by name.

    Args:
      steps: of the run.

    Raises:
      ConfigurationError: a decay that is not between 0 and 1, or a start after the end of the run.
    """
    averages = {}
    if config.ema_decay is not None:
        if not 0 < config.ema_decay < 1:
            raise ConfigurationError(f"--ema_decay must be in (0, 1), got {config.ema_decay}")
        averages["ema"] = RunningAverage(decay=config.ema_decay)
    if config.swa_start is not None:
        if not 0 <= config.swa_start < steps:
            raise ConfigurationError(
                f"--swa_start must be a step of the run, from 0 to {steps - 1}, got "
                f"{config.swa_start}"
            )
        averages["swa"] = RunningAverage(start=config.swa_start)
    return averages
