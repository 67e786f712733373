"""The flags of a plan's hours."""

import math
from collections.abc import Callable
from typing import NamedTuple

from absl import flags
from absl.flags import FLAGS

from jaxlocal import ConfigurationError
from jaxlocal.communication.collective_costs import ALL_REDUCE

POSITIVE = ("bandwidth_gbps", "cluster_devices", "step_ms", "hours_data_parallel", "hours_planned")
NEEDS = {"hours_data_parallel": "hours_planned", "hours_planned": "hours_data_parallel"}


class Options(NamedTuple):
    """The flags of the hours; None where they are not given."""

    bandwidth_gbps: float | None = None
    latency_us: float | None = None
    all_reduce: str | None = None
    cluster_devices: int | None = None
    step_ms: float | None = None
    jitter: float | None = None
    slowdown: str | None = None
    hours_data_parallel: float | None = None
    hours_planned: float | None = None


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Register a flag for every field of `Options`."""
    real, whole, text = flags.DEFINE_float, flags.DEFINE_integer, flags.DEFINE_string
    helps: dict[str, tuple[Callable, str]] = {
        "bandwidth_gbps": (real, "Plan the hours on a cluster too: Gbit/s of a device's link."),
        "latency_us": (real, "Latency of a message there, in µs. By default 0."),
        "all_reduce": (text, f"How devices average: {', '.join(ALL_REDUCE)}. By default ring."),
        "cluster_devices": (whole, "Devices of the cluster. By default one for each worker."),
        "step_ms": (
            real,
            "Time of a worker's step there, in ms. By default measured on this machine.",
        ),
        "jitter": (real, "Coefficient of variation of the steps of a device. By default 0."),
        "slowdown": (text, "Factors by which the first devices are slower, as in 2,1.5."),
        "hours_data_parallel": (real, "Known hours of data parallelism; with --hours_planned."),
        "hours_planned": (
            real,
            "Known hours of this run, from which those of other periods are predicted.",
        ),
    }
    for name, (define, about) in helps.items():
        define(name, None, about, flag_values=values)


def from_flags(values: flags.FlagValues = FLAGS) -> Options:
    """The options that the flags describe.

    Raises:
      ConfigurationError: an option that is not positive, or that needs another one.
    """
    options = Options(**{name: values[name].value for name in Options._fields})
    for name, value in options._asdict().items():
        if value is None:
            continue
        if name in POSITIVE and not 0 < value < math.inf:
            raise ConfigurationError(f"--{name} must be a number > 0, got {value}")
        other = NEEDS.get(name, "bandwidth_gbps")
        if getattr(options, other) is None:
            raise ConfigurationError(f"--{name}={value} needs --{other} too")
    return options
