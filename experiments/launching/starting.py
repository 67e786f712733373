"""What a binary settles before JAX starts: the virtual devices of a CPU, their patience with each
other, and the compilation cache."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator

import jax

from experiments.building.checks import check_numbers, mesh_shape
from experiments.building.config import Config
from experiments.building.job import worker_grid
from experiments.launching.program_cache import keep_programs
from jaxlocal import ConfigurationError
from jaxlocal.parallel.mesh import largest_mesh

# By default XLA ends the process where one of a CPU's devices comes to a collective 40 s after the
# other, as happens after long rounds on cores that have other work too, or to a suspended process.
# XLA ends the process at a flag that it does not know: these are known to jaxlib up to 0.11.
PATIENCE_UP_TO = (0, 11)
PATIENCE = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 600,
    "xla_cpu_collective_call_terminate_timeout_seconds": 3600,
}
# The most virtual devices that a mesh is given: more than that is a slip.
MOST_DEVICES = 256
ABOUT = """On a CPU the workers are divided over as many virtual devices as use the cores, or as
--mesh asks for; JAX_NUM_CPU_DEVICES=N makes it N. Compiled programs are kept in ~/.cache/jaxlocal;
JAX_COMPILATION_CACHE_DIR=FOLDER keeps them elsewhere, and empty nowhere."""


def start(configs: Iterable[Config], processes: int = 1, joined: int = 1) -> None:
    """Settle it for some runs, so many processes at once on this machine; a run of so many joined
    ones.

    What the user has settled by JAX's own variables stays, as does all once JAX has started.
    """
    configs = list(configs)
    at_once, asked = max(1, cores() // processes), -(-_asked_for(configs) // joined)
    use_the_cores(_grids(configs), at_once, joined, asked)
    be_patient()
    keep_programs()


def _grids(configs: Iterable[Config]) -> Iterator[tuple[int, int]]:
    """Hubs and workers a hub of all that can be run; what is wrong is told when it is built."""
    for config in configs:
        with contextlib.suppress(ConfigurationError):
            check_numbers(config)
            yield worker_grid(config)


def _asked_for(configs: Iterable[Config]) -> int:
    """The devices of the largest --mesh; 0 without one."""
    sizes = [0]
    for config in configs:
        with contextlib.suppress(ConfigurationError):
            sizes.append(math.prod(mesh_shape(config) or (0,)))
    return min(max(sizes), MOST_DEVICES)


def cores() -> int:
    """The cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # which Linux has
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def use_the_cores(
    grids: Iterable[tuple[int, int]], count: int, joined: int = 1, least: int = 1
) -> None:
    """Make a CPU as many virtual devices, at most so many, as the largest mesh of a grid fills;
    where processes are joined, this one's share of it; and at least so many."""
    by_flag = "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if by_flag or jax.config.values["jax_num_cpu_devices"] >= 0:
        return
    meshes = (largest_mesh(grid, joined * count, joined) for grid in grids)
    wanted = max((math.prod(mesh) // joined for mesh in meshes), default=1)
    wanted = max(wanted, least)
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", wanted)


def be_patient() -> None:
    """Let a CPU's collectives wait PATIENCE, where the user has not said how long."""
    if jax.__version_info__[:2] > PATIENCE_UP_TO:
        return
    chosen = os.environ.get("XLA_FLAGS", "").strip()
    if chosen and not chosen.startswith("-"):  # a file of flags
        return
    patience = [f"--{name}={seconds}" for name, seconds in PATIENCE.items() if name not in chosen]
    os.environ["XLA_FLAGS"] = " ".join([*chosen.split(), *patience])
