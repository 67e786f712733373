"""Slow down the link between processes: each runs in a network namespace of Linux, and `tc` limits
what the namespace sends over a bridge."""

import contextlib
import math
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from jaxlocal.errors import ConfigurationError

HOSTS = Path("/etc/netns")  # `ip netns exec` mounts its files over those in /etc
BURST_SECONDS = 0.25e-3  # sent at once by a token bucket, whose timers are no finer
PACKET_BYTES = 1514
QUEUE_BYTES = 1 << 24


class NoLink(Exception):
    """This machine cannot slow down a link; the text states the reason."""


class Link:
    """The link between network namespaces, which starts at full speed.

    Args:
      name: prefix of the namespaces' names, which are NAME-0, NAME-1 and so on.
      count: number of namespaces.
      mbps: most that each namespace sends when the link is slow, in 10⁶ bits a second; the link
        carries both directions at once.
      ms: delay of a packet in one direction when the link is slow, in 10⁻³ seconds. Only a kernel
        with netem can delay packets: without it the attribute `ms` is 0.

    Raises:
      NoLink: the kernel cannot limit what a namespace sends.
    """

    def __init__(self, name: str, count: int, mbps: float, ms: float):
        self._names = [f"{name}-{number}" for number in range(count)]
        self._is_slow = False
        self.mbps, self.ms, self.netem = mbps, ms, True
        try:
            self._limit(self._names[0], "replace", *netem(mbps, ms))
        except NoLink:
            self.ms, self.netem = 0.0, False
            self._limit(self._names[0], "replace", *token_bucket(mbps))
        self._limit(self._names[0], "del")

    def command_prefix(self, number: int) -> list[str]:
        """The words that make a command run in a namespace when they precede it."""
        return ["ip", "netns", "exec", self._names[number]]

    @staticmethod
    def address(number: int) -> str:
        """The address of a namespace."""
        return f"10.0.0.{number + 1}"

    def set_slow(self, slow: bool) -> None:
        """Slow the link down, or return it to full speed."""
        rule = netem(self.mbps, self.ms) if self.netem else token_bucket(self.mbps)
        for name in self._names if slow != self._is_slow else ():
            self._limit(name, *(("replace", *rule) if slow else ("del",)))
        self._is_slow = slow

    def _limit(self, name: str, verb: str, *rule: str) -> None:
        _run("tc", "-n", name, "qdisc", verb, "dev", "eth0", "root", *rule)


def netem(mbps: float, ms: float) -> tuple[str, ...]:
    """A `tc` rule that limits the rate and delays packets; its queue holds 2¹⁴ packets.

    >>> " ".join(netem(100, 1))
    'netem rate 100000000bit delay 1000us limit 16384'
    """
    rate, delay = f"{mbps * 1e6:.0f}bit", f"{ms * 1e3:.0f}us"
    return ("netem", "rate", rate, "delay", delay, "limit", "16384")


def token_bucket(mbps: float) -> tuple[str, ...]:
    """A `tc` rule that limits the rate alone.

    The bucket holds at least two packets, or as much as `BURST_SECONDS` send.

    >>> " ".join(token_bucket(1000))
    'tbf rate 1000000000bit burst 31250 limit 16777216'
    """
    burst = max(2 * PACKET_BYTES, round(mbps * 1e6 / 8 * BURST_SECONDS))
    rate = f"{mbps * 1e6:.0f}bit"
    return ("tbf", "rate", rate, "burst", str(burst), "limit", str(QUEUE_BYTES))


def check_speed(mbps: float, ms: float) -> None:
    """Check the rate and the delay of a slow link.

    Raises:
      ConfigurationError: the rate is not positive, the delay negative, or one is not finite.
    """
    if not 0 < mbps < math.inf:
        raise ConfigurationError(f"--link_mbps must be a number > 0, got {mbps:g}")
    if not 0 <= ms < math.inf:
        raise ConfigurationError(f"--link_ms must be a number ≥ 0, got {ms:g}")


@contextlib.contextmanager
def slow_link(count: int, mbps: float, ms: float) -> Iterator[Link]:
    """Make network namespaces and the link between them, and remove them in the end.

    Args:
      count: number of namespaces.
      mbps, ms: see `Link`.

    Raises:
      NoLink: the user is not root, or the programs or the kernel cannot make one.
    """
    if os.geteuid() != 0:
        raise NoLink("network namespaces need root")
    name = f"jaxlocal{os.getpid()}"
    switch = f"{name}-switch"
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, HOSTS)
        _add_namespace(switch, stack)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for number in range(count):
            namespace = f"{name}-{number}"
            _add_namespace(namespace, stack)
            _write_hosts(namespace, Link.address(number), stack)
            _connect(namespace, switch, number)
        yield Link(name, count, mbps, ms)


def _add_namespace(name: str, stack: contextlib.ExitStack) -> None:
    stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
    _run("ip", "netns", "add", name)


def _connect(name: str, switch: str, number: int) -> None:
    """Join a namespace to the bridge by a pair of virtual interfaces."""
    port = f"port{number}"
    for command in (
        f"-n {switch} link add {port} type veth peer name eth0 netns {name}",
        f"-n {switch} link set {port} master bridge up",
        f"-n {name} addr add {Link.address(number)}/24 dev eth0",
        f"-n {name} link set eth0 up",
        f"-n {name} link set lo up",
    ):
        _run("ip", *command.split())


def _write_hosts(name: str, address: str, stack: contextlib.ExitStack) -> None:
    """Make the machine's name resolve to the namespace's address, since gloo listens there."""
    folder = HOSTS / name
    stack.callback(_remove_empty, folder)
    stack.callback((folder / "hosts").unlink, missing_ok=True)
    try:
        folder.mkdir(parents=True)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
    except OSError as error:
        raise NoLink(f"{error.filename}: {error.strerror}") from error


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise NoLink(f"the program {command[0]!r} of iproute2 is not installed") from None
    except subprocess.CalledProcessError as error:
        status = f"exit status {error.returncode}"
        printed = (error.stderr.strip().splitlines() or [status])[0]
        raise NoLink(f"`{' '.join(command)}` failed: {printed!r}") from None
