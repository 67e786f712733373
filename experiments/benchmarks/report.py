"""Write the figures of a suite, and report when other processes may have distorted them."""

import platform
import tempfile
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import jaxlocal
from experiments.benchmarks.machine_load import BUSY_SHARE
from experiments.building.files import local_path
from experiments.launching.starting import cores
from experiments.running.recording import write_json
from jaxlocal.errors import ConfigurationError


def check_output(output: str) -> str:
    """Check that a file can be written, before a suite runs for minutes; returns its path.

    Raises:
      ConfigurationError: the file is a folder, or its folder is missing or cannot be written.
    """
    path = local_path("--output", output)
    folder = path.absolute().parent
    if path.name == "" or path.is_dir():
        raise ConfigurationError(f"--output={output} is not the name of a file")
    if not folder.is_dir():
        raise ConfigurationError(f"--output={output} is in a folder that does not exist")
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=path.name):
            return str(path)
    except OSError as error:
        raise ConfigurationError(f"--output={output} cannot be written: {error.strerror}") from None


def write_figures(suite: str, figures: dict[str, Any], output: str, console: Console) -> None:
    """Write the figures of a suite and facts about this machine as JSON.

    Args:
      suite: its name.
      figures: of the suite, "other_load_before" and "other_load_during" among them.
      output: name of the file.
      console: where a warning of a busy machine and the name of the file are printed.
    """
    busy = _report_busy(figures, console)
    write_json(Path(output), {"suite": suite, **figures, "busy": busy, **describe_machine()})
    console.print(output, highlight=False, soft_wrap=True)


def describe_machine() -> dict[str, Any]:
    """Facts about this machine: its devices, processor and cores, and the versions of libraries."""
    return {
        "devices": [device.device_kind for device in jax.devices()],
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": cores(),
        "versions": {"jaxlocal": jaxlocal.__version__, "jax": jax.__version__},
    }


def _processor() -> str:
    """The name of the processor, as Linux states it, or what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _report_busy(figures: dict[str, Any], console: Console) -> bool:
    """Whether other processes used too much of the machine, which is then printed."""
    before = figures["other_load_before"] or 0
    during = max(filter(None, figures["other_load_during"]), default=0)
    busy = max(before, during) > BUSY_SHARE
    if busy:
        console.print(
            f"\nthe machine was busy: other processes used {before:.0%} of its cores before the "
            f"benchmark, and up to {during:.0%} during it"
        )
    return busy
