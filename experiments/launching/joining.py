"""Join the processes of one run: they connect, start JAX together, and end together."""

import contextlib
import hashlib
import ipaddress
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from experiments.building.config import Config, default_workdir
from experiments.launching.exchange import exchange
from experiments.launching.link import RESUMING, Link, Place
from experiments.launching.meeting import meet
from experiments.launching.sameness import check_devices, versions_and_settings
from experiments.launching.secret import shared_secret
from experiments.launching.statuses import FAILED, INTERRUPTED, explained
from experiments.launching.stopping import WORDS, ending_by, status_of
from jaxlocal import ConfigurationError

PATIENCE = 60.0  # seconds that processes wait for each other at the start
NOTICE = 5.0  # seconds within which a process learns that another one has ended
MOST_PROCESSES = 1 << 16
BY_HAND = ("coordinator_address", "process_count", "process_id")
LONGEST_LINE = 200  # characters of a flag and its value
OWN = ("--data_dir", "--stream_workers")  # flags that may differ between processes


class Group(NamedTuple):
    """The place of this process in its run."""

    place: Place
    local_devices: Sequence[int] | None = None  # that this process may use; by default all


def find_group(config: Config) -> Group | None:
    """The processes of a run, from the flags or from the cluster; None for a single process.

    Raises:
      ConfigurationError: flags that contradict each other, or `--distributed` without a cluster.
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
    if count > MOST_PROCESSES:
        raise ConfigurationError(f"--process_count must be at most {MOST_PROCESSES}, got {count}")
    if not 0 <= number < count:
        raise ConfigurationError(
            f"--process_id must be from 0 to {count - 1} with --process_count={count}, got {number}"
        )
    return Group(Place(host, port, count, number)) if count > 1 else None


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    number = int(port) if re.fullmatch("[0-9]{1,5}", port) else 0
    if not (_is_host(host) and 0 < number < 1 << 16):
        raise ConfigurationError(
            f"--coordinator_address must be HOST:PORT with a port from 1 to 65535, got {text!r}"
        )
    return host, number


def _is_host(text: str) -> bool:
    try:
        if ":" in text:
            return bool(ipaddress.IPv6Address(text))
        return re.search(r"[\s/@\0[\]]", text) is None and bool(text.encode("idna"))
    except ValueError:
        return False


def _detected() -> Group | None:
    """The processes that `jax.distributed` detects: of Slurm, Open MPI, Kubernetes, TPU."""
    from jax._src.clusters import ClusterEnv

    try:
        address, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(PATIENCE)
        )
    except Exception as error:  # the kind depends on the cluster
        raise ConfigurationError(f"--distributed could not ask the cluster: {error}") from error
    if address is None or count is None or number is None:
        raise ConfigurationError(
            "--distributed found no cluster that JAX knows, such as Slurm, Open MPI, Kubernetes or "
            "TPU; give --coordinator_address, --process_count and --process_id"
        )
    return Group(Place(*_address(address), count, number), devices) if count > 1 else None


@contextlib.contextmanager
def joined(config: Config, group: Group | None, patience: float = PATIENCE) -> Iterator[None]:
    """Join the processes: in this context JAX has the devices of all of them, and a failure of one
    ends all.

    Args:
      patience: seconds that the processes wait for each other.

    Raises:
      ConfigurationError: a process is missing after that time, or flags differ.
    """
    if group is None:
        yield
        return
    secret = shared_secret(_shared_folder(config), patience)
    link = meet(group.place, _shared_lines(config, group.place.processes), secret, patience)
    who = f"process {link.place.number} of {link.place.processes}"
    end = lambda number: link.end(f"{who} was {WORDS[number]}; {RESUMING}", status_of(number))
    try:
        with ending_by(end):
            _initialize(group, link)
            check_devices()
            exchange(link, patience)
            yield
            jax.distributed.shutdown()
            link.leave()
    except BaseException as error:
        _end(link, error)


def _shared_folder(config: Config) -> Path:
    """A folder that all processes share, also where their flags differ by mistake."""
    return Path(config.workdir) if config.workdir else default_workdir(config).parent


def _shared_lines(config: Config, count: int) -> list[str]:
    """Flags, versions and settings that must be the same in all processes."""
    lines = [line for line in config.flag_lines() if line.split("=")[0] not in OWN]
    return [f"--process_count={count}", *map(_shortened, lines), *versions_and_settings()]


def _shortened(line: str) -> str:
    """A line that fits in a message and in a sentence: a long one ends in its digest."""
    if len(line) <= LONGEST_LINE:
        return line
    digest = hashlib.sha256(line.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{line[: LONGEST_LINE // 2]}… ({len(line)} characters, digest {digest})"


def _initialize(group: Group, link: Link) -> None:
    place = group.place
    _silence_libraries()
    jax.config.update(
        "jax_enable_preemption_service", False
    )  # its handler would replace that of SIGTERM
    with tempfile.TemporaryDirectory(prefix="jaxlocal-", dir=_short_folder()) as folder:
        path = f"{folder}/coordinator"
        link.relay(path)
        jax.distributed.initialize(
            f"unix:{path}",
            place.processes,
            place.number,
            group.local_devices,
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"unix:{path}",
            heartbeat_timeout_seconds=3600,  # the link notices sooner, and knows the cause
        )


def _short_folder() -> str:
    """Where a Unix socket can be, whose path has at most 107 bytes."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) < 70 else "/tmp"


def _silence_libraries() -> None:
    """Keep what Python prints, and discard what libraries write to the descriptor of standard
    output: Gloo writes there for every process and program."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _end(link: Link, error: BaseException) -> None:
    """End all processes with the sentence of the one that failed first.

    Where one process ends, collectives of the others fail with errors of many kinds.
    """
    if not isinstance(error, ConfigurationError | KeyboardInterrupt):
        time.sleep(NOTICE)  # the link may end this process meanwhile, with the cause
    known = explained(error)
    if isinstance(error, KeyboardInterrupt):
        who = f"process {link.place.number} of {link.place.processes}"
        known = f"{who} was interrupted; {RESUMING}", INTERRUPTED
    if known is None:
        traceback.print_exception(error)
        known = f"{type(error).__name__} in process {link.place.number}", FAILED
    link.end(*known)
