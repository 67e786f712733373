"""Connections between the processes of one run: they compare their flags, watch each other, and
end together.

Every process keeps a connection to process 0. Both sides send a heartbeat. A process that fails
sends the reason, process 0 forwards it, and all processes end with that sentence.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

from experiments.launching.relay import in_background
from experiments.launching.statuses import FAILED
from jaxlocal import ConfigurationError

BEAT, SILENCE = 5.0, 30.0  # seconds between heartbeats; without one, until all processes end
RESUMING = "the same commands resume from the last checkpoint"


class Place(NamedTuple):
    """Where the processes of a run connect, and which of them this is."""

    host: str
    port: int
    processes: int
    number: int

    @property
    def loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def bound(self) -> str:
        """The address at which process 0 listens: the loopback one, or all of its machine."""
        if self.loopback:
            return "::1" if self.host == "::1" else "127.0.0.1"
        return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"


class Link:
    """The connections of this process, made by `meet`; they last as long as the process."""

    def __init__(self, place: Place, peers: "dict[int, Peer]", service_port: int):
        self.place, self.service_port = place, service_port
        self._peers = peers
        self._done: set[int] = set()
        self._ending = threading.Lock()
        for number, peer in peers.items():
            peer.connection.settimeout(SILENCE)
            in_background(self._listen, number, peer)
        in_background(self._beat)

    def done(self) -> None:
        """Announce the end of the run: the end of this process is then no failure."""
        self._send_all({"done": True})

    def end(self, sentence: str, status: int) -> NoReturn:
        """End all processes with one sentence; where another process has failed before, with its
        sentence."""
        with self._ending:
            self._send_all({"sentence": sentence, "status": status})
            print("error: " + " ".join(sentence.split()), file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(status)  # a collective with the other processes would never return

    def _listen(self, number: int, peer: "Peer") -> None:
        try:
            for message in peer.messages:
                if message.get("done"):
                    self._done.add(number)
                elif "sentence" in message:
                    self.end(message["sentence"], message["status"])
            what = "has ended"
        except TimeoutError:
            what = f"has sent nothing for {SILENCE:.0f} s"
        except OSError:
            what = "has ended"
        if number not in self._done:
            self.end(f"process {number} of {self.place.processes} {what}; {RESUMING}", FAILED)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            self._send_all({})

    def _send_all(self, message: dict[str, Any]) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # `_listen` notices that the peer has ended
                _send(peer.connection, message)


class Peer(NamedTuple):
    """A connection and the messages that arrive on it, some of which may be read already."""

    connection: socket.socket
    messages: Iterator[dict[str, Any]]


def meet(place: Place, flags: list[str], patience: float) -> Link:
    """Connect the processes of a run, and check that their flags are the same.

    Args:
      flags: lines "--name=value" that must be the same in all processes.
      patience: seconds to wait for the others.

    Raises:
      ConfigurationError: in every connected process: some are missing, or flags differ.
    """
    until = time.monotonic() + patience
    if place.number == 0:
        return _accept_all(place, flags, until, patience)
    peer = _connect(place, until, patience)
    _send(peer, {"number": place.number, "flags": flags})
    peer.settimeout(2 * patience)  # process 0 may start last, and then waits for the others
    messages = _messages(peer)
    try:
        answer = next(messages, {})
    except TimeoutError:
        raise ConfigurationError(_unanswered(place, patience)) from None
    except (OSError, ValueError):
        answer = {}
    if "sentence" in answer:
        raise ConfigurationError(answer["sentence"])
    if "port" not in answer:
        raise ConfigurationError(
            f"the coordinator, process 0 at {place.host}:{place.port}, has ended before it "
            f"answered process {place.number} of {place.processes}"
        )
    return Link(place, {0: Peer(peer, messages)}, answer["port"])


def _accept_all(place: Place, flags: list[str], until: float, patience: float) -> Link:
    """Process 0: wait for all other processes, check their flags and answer them together."""
    try:
        listener = _listening(place.bound, place.port)
    except OSError as error:
        raise ConfigurationError(
            f"process 0 cannot listen at {place.host}:{place.port}: {error.strerror}"
        ) from None
    with listener:
        joined = _accepted(listener, place.processes - 1, until)
    wrong = _mismatch(place, flags, joined, patience)
    port = _free_port()
    for process in joined:
        with contextlib.suppress(OSError):  # it may have ended in the meantime
            _send(process.peer.connection, {"sentence": wrong} if wrong else {"port": port})
    if wrong:
        raise ConfigurationError(wrong)
    return Link(place, {process.number: process.peer for process in joined}, port)


class _Joined(NamedTuple):
    """A process that has connected to process 0."""

    number: int
    flags: list[str]
    peer: Peer


def _accepted(listener: socket.socket, count: int, until: float) -> list[_Joined]:
    """The processes that connect until a time, at most `count`."""
    joined: list[_Joined] = []
    while len(joined) < count and (left := until - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(OSError, ValueError, KeyError, StopIteration):
            connection, _ = listener.accept()
            connection.settimeout(BEAT)  # a process of this run sends its flags at once
            messages = _messages(connection)
            hello = next(messages)
            peer = Peer(connection, messages)
            joined.append(_Joined(int(hello["number"]), list(hello["flags"]), peer))
    return joined


def _mismatch(place: Place, flags: list[str], joined: list[_Joined], patience: float) -> str | None:
    """The sentence about processes that are there twice, have other flags or are missing."""
    numbers = [process.number for process in joined]
    wrong = _twice([0, *numbers])
    for process in sorted(joined, key=lambda process: process.number):
        wrong = wrong or _difference(flags, process.number, process.flags)
    return wrong or _missing(place, numbers, patience)


def _listening(address: str, port: int) -> socket.socket:
    """A listener at an address of this machine; "::" stands for all addresses, IPv4 and IPv6."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, dualstack_ipv6=address == "::")


def _twice(numbers: list[int]) -> str | None:
    twice = [number for number in numbers if numbers.count(number) > 1]
    return f"several processes have --process_id={twice[0]}" if twice else None


def _missing(place: Place, numbers: list[int], patience: float) -> str | None:
    missing = sorted(set(range(1, place.processes)) - set(numbers))
    if not missing:
        return None
    who = f"process {missing[0]}" if len(missing) == 1 else f"processes {_listed(missing)}"
    have = "has" if len(missing) == 1 else "have"
    return (
        f"{who} of {place.processes} {have} not connected to {place.host}:{place.port} within "
        f"{patience:.0f} s"
    )


def _difference(ours: list[str], number: int, theirs: list[str]) -> str | None:
    mine, its = (dict(line.split("=", 1) for line in lines) for lines in (ours, theirs))
    shown = lambda name, flags: f"{name}={flags[name]}" if name in flags else f"no {name}"
    for name in [*mine, *its]:
        if mine.get(name) != its.get(name):
            return (
                f"the processes of a run need the same flags and versions: process 0 has "
                f"{shown(name, mine)}, process {number} {shown(name, its)}"
            )
    return None


def _connect(place: Place, until: float, patience: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection((place.host, place.port), timeout=patience)
        except OSError:  # refused until process 0 has started
            if time.monotonic() > until:
                raise ConfigurationError(_unanswered(place, patience)) from None
            time.sleep(0.1)


def _unanswered(place: Place, patience: float) -> str:
    return (
        f"the coordinator, process 0 at {place.host}:{place.port}, has not answered process "
        f"{place.number} of {place.processes} for {patience:.0f} s"
    )


def _free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


def _messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
    buffer = b""
    while data := connection.recv(1 << 16):
        *lines, buffer = (buffer + data).split(b"\n")
        yield from map(json.loads, lines)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
