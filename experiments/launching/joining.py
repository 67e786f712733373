"""One run on several processes: they meet, start JAX together, and end together."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

import jaxlocal
from experiments.building.config import Config
from experiments.launching.command_line import FAILED, INTERRUPTED, explained
from experiments.launching.link import GOING_ON, Link, Place, meet, relay
from jaxlocal import ConfigurationError

PATIENCE = 60.0  # seconds that processes wait for each other at the start
HEARSAY = 5.0  # seconds within which a process hears that another is gone
BY_HAND = ("coordinator_address", "process_count", "process_id")
OWN = ("--data_dir", "--stream_workers")  # flags that each process has for itself


class Group(NamedTuple):
    """Which process of how many this is."""

    place: Place
    local_devices: Sequence[int] | None = None  # that this one may use; by default all


def find_group(config: Config) -> Group | None:
    """What the flags say of the processes, or the cluster; None where there is but one.

    Raises:
      ConfigurationError: flags that contradict each other, no cluster.
    """
    given = {f"--{name}": getattr(config, name) for name in BY_HAND}
    here = [f"{name}={value}" for name, value in given.items() if value is not None]
    if config.distributed:
        if here:
            raise ConfigurationError(
                f"--distributed asks the cluster for the processes, and {here[0]} was given too"
            )
        return _detected()
    if not here:
        return None
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ConfigurationError(f"{here[0]} was given without {' and '.join(missing)}")
    count, number = int(config.process_count or 0), int(config.process_id or 0)
    host, port = _address(str(config.coordinator_address))
    if count < 1:
        raise ConfigurationError(f"--process_count must be at least 1, got {count}")
    if not 0 <= number < count:
        raise ConfigurationError(
            f"--process_id must be from 0 to {count - 1} with --process_count={count}, got {number}"
        )
    return Group(Place(host, port, count, number)) if count > 1 else None


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ConfigurationError(f"--coordinator_address must be HOST:PORT, got {text!r}")
    return host, int(port)


def _detected() -> Group | None:
    """As `jax.distributed.initialize()` finds them: Slurm, Open MPI, Kubernetes, TPU."""
    from jax._src.clusters import ClusterEnv

    try:
        address, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(PATIENCE)
        )
    except Exception as error:  # of the machine that tells
        raise ConfigurationError(f"--distributed could not ask the cluster: {error}") from error
    if address is None or count is None or number is None:
        raise ConfigurationError(
            "--distributed found no cluster that JAX knows, such as Slurm, Open MPI, Kubernetes or "
            "TPU; give --coordinator_address, --process_count and --process_id"
        )
    return Group(Place(*_address(address), count, number), devices) if count > 1 else None


@contextlib.contextmanager
def joined(config: Config, group: Group | None, patience: float = PATIENCE) -> Iterator[None]:
    """Within, JAX has the devices of all processes of the group; one that fails ends them all.

    Raises:
      ConfigurationError: not all have come within so many seconds, or their flags differ.
    """
    if group is None:
        yield
        return
    link = meet(group.place, _alike(config, group.place.processes), patience)
    try:
        _initialize(group, link, patience)
        yield
        link.done()
        jax.distributed.shutdown()
    except BaseException as error:
        _end(link, error)


def _alike(config: Config, count: int) -> list[str]:
    """What all processes must have."""
    lines = [line for line in config.flag_lines() if line.split("=")[0] not in OWN]
    return [
        f"--process_count={count}",
        *lines,
        f"jax={jax.__version__}",
        f"jaxlocal={jaxlocal.__version__}",
    ]


def _initialize(group: Group, link: Link, patience: float) -> None:
    place, port, bound = group.place, link.service_port, group.place.bound
    _keep_what_is_printed()
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    address = f"127.0.0.1:{relay(place.host, port, patience) if place.number else port}"
    jax.distributed.initialize(
        address,
        place.processes,
        place.number,
        group.local_devices,
        cluster_detection_method="deactivate",
        coordinator_bind_address=f"{f'[{bound}]' if ':' in bound else bound}:{port}",
        heartbeat_timeout_seconds=3600,  # the link tells sooner, and more kindly
    )


def _keep_what_is_printed() -> None:
    """Gloo greets on standard output, each process and program anew: what Python prints goes on
    there, what others write to the descriptor does not."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _end(link: Link, error: BaseException) -> None:
    """In the words of who failed first: a collective fails where another process is gone, in errors
    of many kinds."""
    if not isinstance(error, ConfigurationError | KeyboardInterrupt):
        time.sleep(HEARSAY)  # in which the link may end this process
    known = explained(error)
    if isinstance(error, KeyboardInterrupt):
        who = f"process {link.place.number} of {link.place.processes}"
        known = f"{who} was interrupted; {GOING_ON}", INTERRUPTED
    if known is None:
        traceback.print_exception(error)
        known = f"{type(error).__name__} in process {link.place.number}", FAILED
    link.end(*known)
