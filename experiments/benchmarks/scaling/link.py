"""A link made slow on purpose: network namespaces of Linux, joined by a bridge, whose senders `tc`
holds back."""

import contextlib
import math
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from jaxlocal.errors import ConfigurationError

HOSTS = Path("/etc/netns")  # what `ip netns exec` shows in place of the files in /etc
BURST_SECONDS = 0.25e-3  # what a token bucket lets through at once; timers are no finer
PACKET_BYTES = 1514
QUEUE_BYTES = 1 << 24


class NoLink(Exception):
    """Says why no link can be made slow here."""


class Link:
    """As many namespaces as there are processes, each with one link, as yet at full speed.

    Args:
      mbps: what each sends at most when it is slow, 10⁶ bits a second; both ways at once.
      ms: by which a packet then comes later, 10⁻³ seconds, one way. Only netem can do that: without
        it `ms` is 0 whatever was asked for.
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

    def within(self, number: int) -> list[str]:
        """What a command is put after, to run in a namespace."""
        return ["ip", "netns", "exec", self._names[number]]

    @staticmethod
    def address(number: int) -> str:
        return f"10.0.0.{number + 1}"

    def slow(self, on: bool) -> None:
        """Slow the link down, or no longer."""
        rule = netem(self.mbps, self.ms) if self.netem else token_bucket(self.mbps)
        for name in self._names if on != self._is_slow else ():
            self._limit(name, *(("replace", *rule) if on else ("del",)))
        self._is_slow = on

    def _limit(self, name: str, verb: str, *rule: str) -> None:
        _run("tc", "-n", name, "qdisc", verb, "dev", "eth0", "root", *rule)


def netem(mbps: float, ms: float) -> tuple[str, ...]:
    """A rate and a delay, by `tc`; its queue holds 2¹⁴ packets.

    >>> " ".join(netem(100, 1))
    'netem rate 100000000bit delay 1000us limit 16384'
    """
    rate, delay = f"{mbps * 1e6:.0f}bit", f"{ms * 1e3:.0f}us"
    return ("netem", "rate", rate, "delay", delay, "limit", "16384")


def token_bucket(mbps: float) -> tuple[str, ...]:
    """A rate alone, by `tc`; of two packets at once, or what a timer comes too late for.

    >>> " ".join(token_bucket(1000))
    'tbf rate 1000000000bit burst 31250 limit 16777216'
    """
    burst = max(2 * PACKET_BYTES, round(mbps * 1e6 / 8 * BURST_SECONDS))
    rate = f"{mbps * 1e6:.0f}bit"
    return ("tbf", "rate", rate, "burst", str(burst), "limit", str(QUEUE_BYTES))


def check_speed(mbps: float, ms: float) -> None:
    """Raises a ConfigurationError where no link has such a speed."""
    if not 0 < mbps < math.inf:
        raise ConfigurationError(f"--link_mbps must be a number > 0, got {mbps:g}")
    if not 0 <= ms < math.inf:
        raise ConfigurationError(f"--link_ms must be a number ≥ 0, got {ms:g}")


@contextlib.contextmanager
def slow_link(count: int, mbps: float, ms: float) -> Iterator[Link]:
    """A link of so many namespaces, which are gone afterwards whatever happens.

    Raises:
      NoLink: the user, the programs or the kernel cannot make one.
    """
    if os.geteuid() != 0:
        raise NoLink("network namespaces need root")
    name = f"jaxlocal{os.getpid()}"
    switch = f"{name}-switch"
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, HOSTS)
        _namespace(switch, stack)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for number in range(count):
            own = f"{name}-{number}"
            _namespace(own, stack)
            _resolve(own, Link.address(number), stack)
            _connect(own, switch, number)
        yield Link(name, count, mbps, ms)


def _namespace(name: str, stack: contextlib.ExitStack) -> None:
    stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
    _run("ip", "netns", "add", name)


def _connect(name: str, switch: str, number: int) -> None:
    port = f"port{number}"
    for command in (
        f"-n {switch} link add {port} type veth peer name eth0 netns {name}",
        f"-n {switch} link set {port} master bridge up",
        f"-n {name} addr add {Link.address(number)}/24 dev eth0",
        f"-n {name} link set eth0 up",
        f"-n {name} link set lo up",
    ):
        _run("ip", *command.split())


def _resolve(name: str, address: str, stack: contextlib.ExitStack) -> None:
    """In the namespace the machine's name is its address there: gloo listens at that of its host's
    name."""
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
        raise NoLink(f"there is no program {command[0]!r}, of iproute2") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[0]
        raise NoLink(f"`{' '.join(command)}` said {said!r}") from None
