"""The processes of one run, connected: who has come and with which flags, who has failed and why.

Every process keeps a connection to process 0, on which it says that it lives and hears the same of
the others. Whoever fails says why, process 0 passes it on, and all end with that one sentence.
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

from jaxlocal import ConfigurationError

BEAT, SILENCE = 5.0, 30.0  # seconds between signs of life; without one, after which all end
FAILED = 1  # an exit status
GOING_ON = "the same commands go on from the last checkpoint"


class Place(NamedTuple):
    """Where processes meet, and which of them this is."""

    host: str
    port: int
    processes: int
    number: int

    @property
    def loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def bound(self) -> str:
        """The address at which process 0 listens: on loopback that one only, else all of its
        machine."""
        if self.loopback:
            return "::1" if self.host == "::1" else "127.0.0.1"
        return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"


class Link:
    """The connections of this process; made by `meet`, for good."""

    def __init__(self, place: Place, peers: "dict[int, Peer]", service_port: int):
        self.place, self.service_port = place, service_port
        self._peers = peers
        self._done: set[int] = set()
        self._ending = threading.Lock()
        for number, peer in peers.items():
            peer.connection.settimeout(SILENCE)
            _thread(self._listen, number, peer)
        _thread(self._beat)

    def done(self) -> None:
        """This process has come to the end of its run: that it is gone is no failure."""
        self._tell({"done": True})

    def end(self, sentence: str, status: int) -> NoReturn:
        """Tell all processes why, and end; where another has told already, with what that said."""
        with self._ending:
            self._tell({"sentence": sentence, "status": status})
            print("error: " + " ".join(sentence.split()), file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(status)  # what is under way with the others would never return

    def _listen(self, number: int, peer: "Peer") -> None:
        try:
            for word in peer.words:
                if word.get("done"):
                    self._done.add(number)
                elif "sentence" in word:
                    self.end(word["sentence"], word["status"])
            what = "has ended"
        except TimeoutError:
            what = f"has said nothing for {SILENCE:.0f} s"
        except OSError:
            what = "has ended"
        if number not in self._done:
            self.end(f"process {number} of {self.place.processes} {what}; {GOING_ON}", FAILED)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            self._tell({})

    def _tell(self, word: dict[str, Any]) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # who listens to it hears that it is gone
                _say(peer.connection, word)


class Peer(NamedTuple):
    """A connection, and what is said on it from here on, of which some may have been read."""

    connection: socket.socket
    words: Iterator[dict[str, Any]]


def meet(place: Place, flags: list[str], patience: float) -> Link:
    """Wait until all processes have come, with the same flags.

    Args:
      flags: lines "--name=value" that must be alike.
      patience: seconds.

    Raises:
      ConfigurationError: in every process that has come: not all have, or flags differ.
    """
    until = time.monotonic() + patience
    if place.number == 0:
        return _receive(place, flags, until, patience)
    peer = _reach(place, until, patience)
    _say(peer, {"number": place.number, "flags": flags})
    peer.settimeout(2 * patience)  # process 0 may have come last, and waits as long for the others
    words = _words(peer)
    try:
        answer = next(words, {})
    except TimeoutError:
        raise ConfigurationError(_unanswered(place, patience)) from None
    except (OSError, ValueError):
        answer = {}
    if "sentence" in answer:
        raise ConfigurationError(answer["sentence"])
    if "port" not in answer:
        raise ConfigurationError(
            f"the coordinator, process 0 at {place.host}:{place.port}, has ended before process "
            f"{place.number} of {place.processes} was answered"
        )
    return Link(place, {0: Peer(peer, words)}, answer["port"])


def _receive(place: Place, flags: list[str], until: float, patience: float) -> Link:
    """Process 0's part: it hears all others, and answers them together."""
    try:
        listener = _listening(place.bound, place.port)
    except OSError as error:
        raise ConfigurationError(
            f"process 0 cannot listen at {place.host}:{place.port}: {error.strerror}"
        ) from None
    came: list[tuple[int, list[str], Peer]] = []
    with listener:
        while len(came) < place.processes - 1 and (left := until - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(OSError, ValueError, KeyError, StopIteration):
                peer, _ = listener.accept()
                peer.settimeout(BEAT)  # who says nothing is none of ours
                words = _words(peer)
                hello = next(words)
                came.append((int(hello["number"]), list(hello["flags"]), Peer(peer, words)))
    numbers = [number for number, _, _ in came]
    wrong = _twice([0, *numbers])
    for number, theirs, _ in sorted(came, key=lambda one: one[0]):
        wrong = wrong or _difference(flags, number, theirs)
    wrong = wrong or _missing(place, numbers, patience)
    port = _free_port()
    for _, _, told in came:
        with contextlib.suppress(OSError):  # one that has gone while others came
            _say(told.connection, {"sentence": wrong} if wrong else {"port": port})
    if wrong:
        raise ConfigurationError(wrong)
    return Link(place, {number: peer for number, _, peer in came}, port)


def _listening(address: str, port: int) -> socket.socket:
    """At an address of this machine; "::" is all of either family."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, dualstack_ipv6=address == "::")


def _twice(numbers: list[int]) -> str | None:
    twice = [number for number in numbers if numbers.count(number) > 1]
    return f"several processes have --process_id={twice[0]}" if twice else None


def _missing(place: Place, came: list[int], patience: float) -> str | None:
    missing = sorted(set(range(1, place.processes)) - set(came))
    if not missing:
        return None
    who = f"process {missing[0]}" if len(missing) == 1 else f"processes {_listed(missing)}"
    have = "has" if len(missing) == 1 else "have"
    return (
        f"{who} of {place.processes} {have} not come to {place.host}:{place.port} within "
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


def _reach(place: Place, until: float, patience: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection((place.host, place.port), timeout=patience)
        except OSError:  # refused, while process 0 has not come
            if time.monotonic() > until:
                raise ConfigurationError(_unanswered(place, patience)) from None
            time.sleep(0.1)


def _unanswered(place: Place, patience: float) -> str:
    return (
        f"the coordinator, process 0 at {place.host}:{place.port}, has not answered process "
        f"{place.number} of {place.processes} for {patience:.0f} s"
    )


def relay(host: str, port: int, patience: float) -> int:
    """A port of this machine that stands for that one: what is said there is passed on, but not
    that the other end is gone, at which JAX's client would end this process in its own words."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            near, _ = listener.accept()
            far = _connected(host, port, patience)
            if far:
                far.settimeout(None)
                _thread(_pass_on, near, far)
                _thread(_pass_on, far, near)

    _thread(serve)
    return listener.getsockname()[1]


def _connected(host: str, port: int, patience: float) -> socket.socket | None:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            return socket.create_connection((host, port), timeout=patience)
        except OSError:  # it has not started yet
            time.sleep(0.05)
    return None


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)


def _free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


def _words(peer: socket.socket) -> Iterator[dict[str, Any]]:
    buffer = b""
    while data := peer.recv(1 << 16):
        *lines, buffer = (buffer + data).split(b"\n")
        yield from map(json.loads, lines)


def _say(peer: socket.socket, word: dict[str, Any]) -> None:
    peer.sendall(json.dumps(word).encode() + b"\n")


def _thread(target: Any, *arguments: Any) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
