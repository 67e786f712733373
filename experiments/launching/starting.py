"""Settings before JAX starts: the virtual devices of a CPU, how long they wait for each other, and
the compilation cache."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator

import jax

from experiments.building.checks import check_numbers, mesh_shape
from experiments.building.config import Config
from experiments.building.workers import worker_grid
from experiments.launching.program_cache import keep_programs
from jaxlocal import ConfigurationError
from jaxlocal.parallel.mesh import largest_mesh

# By default XLA ends the process when one device of a CPU reaches a collective 40 s after another,
# which happens after long rounds on busy cores, and when a process is suspended.
# XLA also ends the process at an unknown flag; jaxlib knows these flags up to version 0.11.
PATIENCE_UP_TO = (0, 11)
PATIENCE = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 600,
    "xla_cpu_collective_call_terminate_timeout_seconds": 3600,
}
# The most virtual devices that a mesh gets; a larger --mesh is a mistake.
MOST_DEVICES = 256
ABOUT = """On a CPU the workers are divided over one virtual device per core, as far as they divide,
or over the devices of --mesh; JAX_NUM_CPU_DEVICES=N makes N devices. Compiled programs are kept in
~/.cache/jaxlocal, or in FOLDER with JAX_COMPILATION_CACHE_DIR=FOLDER; an empty value keeps none."""


def start(configs: Iterable[Config], processes: int = 1, joined: int = 1) -> None:
    """Make the settings for some runs.

    What the user has set by JAX's environment variables stays. Once JAX has started, nothing
    changes.

    Args:
      configs: of the runs.
      processes: that run at once on this machine and share its cores.
      joined: processes of one run, which share its devices.
    """
    configs = list(configs)
    at_once, asked = max(1, cores() // processes), -(-_asked_for(configs) // joined)
    use_the_cores(_grids(configs), at_once, joined, asked)
    be_patient()
    keep_programs()


def _grids(configs: Iterable[Config]) -> Iterator[tuple[int, int]]:
    """Worker grids of the configs that are valid; the others raise when they are built."""
    for config in configs:
        with contextlib.suppress(ConfigurationError):
            check_numbers(config)
            yield worker_grid(config)


def _asked_for(configs: Iterable[Config]) -> int:
    """Number of devices of the largest `--mesh`; 0 without one."""
    sizes = [0]
    for config in configs:
        with contextlib.suppress(ConfigurationError):
            sizes.append(math.prod(mesh_shape(config) or (0,)))
    return min(max(sizes), MOST_DEVICES)


def cores() -> int:
    """Number of cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # on Linux only
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def use_the_cores(
    grids: Iterable[tuple[int, int]], count: int, joined: int = 1, least: int = 1
) -> None:
    """Divide a CPU into virtual devices for the largest mesh of the worker grids.

    Args:
      grids: hubs and workers per hub of each run.
      count: the most devices of one process.
      joined: processes that share the mesh.
      least: the fewest devices of this process.
    """
    by_flag = "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if by_flag or jax.config.values["jax_num_cpu_devices"] >= 0:
        return
    meshes = (largest_mesh(grid, joined * count, joined) for grid in grids)
    wanted = max((math.prod(mesh) // joined for mesh in meshes), default=1)
    wanted = max(wanted, least)
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", wanted)


def be_patient() -> None:
    """Let the collectives of a CPU wait `PATIENCE` seconds, unless the user has set how long."""
    if jax.__version_info__[:2] > PATIENCE_UP_TO:
        return
    chosen = os.environ.get("XLA_FLAGS", "").strip()
    if chosen and not chosen.startswith("-"):  # a file of flags
        return
    patience = [f"--{name}={seconds}" for name, seconds in PATIENCE.items() if name not in chosen]
    os.environ["XLA_FLAGS"] = " ".join([*chosen.split(), *patience])
