"""The port of process 0 at the start of a run, which anyone may reach.

Who does not know the secret of the run is refused, and costs the others nothing: every connection
is served at once, for a short time.
"""

import contextlib
import itertools
import queue
import random
import socket
import time
from typing import Any, NamedTuple

from experiments.launching.channel import Channel, Nonsense, close
from experiments.launching.link import BEAT, Place
from experiments.launching.relay import in_background
from experiments.launching.secret import HINT, Secret

MOST_UNKNOWN = 64  # connections at once of which it is not known yet whether they are of the run


class Joined(NamedTuple):
    """A process that has connected to process 0 and knows the secret."""

    number: int
    flags: list[str]
    channel: Channel


class Door:
    """Lets those in that know the secret, until a time, and counts the others."""

    def __init__(self, listener: socket.socket, secret: Secret, until: float):
        self._listener, self._secret, self._until = listener, secret, until
        self._unknown: set[socket.socket] = set()
        self._known: queue.SimpleQueue[Joined] = queue.SimpleQueue()
        self._refused: list[str] = []  # the addresses of strangers
        self._gone: set[int] = set()  # processes that have ended again

    def wait_for(self, count: int) -> list[Joined]:
        """The processes that are connected when there are `count`, or at the end of the time."""
        joined: list[Joined] = []
        while len(joined) < count and time.monotonic() < self._until:
            self._accept()
            while not self._known.empty():
                joined.append(self._known.get())
            self._gone |= {process.number for process in joined if process.channel.ended}
            joined = [process for process in joined if not process.channel.ended]
        while self._unknown:
            self._drop_one()
        return joined

    def missing(self, place: Place, joined: list[Joined], patience: float) -> str | None:
        """The sentence about processes that are not there."""
        here = {process.number for process in joined}
        absent = (number for number in range(1, place.processes) if number not in here)
        missing = list(itertools.islice(absent, 10))
        if not missing:
            return None
        count = place.processes - 1 - len(here)
        who = f"process {missing[0]}" if count == 1 else f"processes {listed(missing, count)}"
        have = "has" if count == 1 else "have"
        ended = " (or has ended again)" if self._gone & set(missing) else ""
        return (
            f"{who} of {place.processes} {have} not connected to {place.host}:{place.port} within "
            f"{patience:.0f} s{ended}{self._about_strangers()}"
        )

    def _about_strangers(self) -> str:
        if not self._refused:
            return ""
        return (
            f"; connections that did not know the secret from {self._secret.source}: "
            f"{len(self._refused)}, the last from {self._refused[-1]}; {HINT}"
        )

    def _accept(self) -> None:
        """Accept a connection, if there is one within a short time."""
        self._listener.settimeout(0.1)
        try:
            connection, address = self._listener.accept()
            self._unknown.add(connection)
            in_background(self._greet, connection, address[0])
        except TimeoutError:
            return
        except (OSError, RuntimeError):  # too many open files or threads
            self._drop_one()
            time.sleep(0.01)
        if len(self._unknown) > MOST_UNKNOWN:
            self._drop_one()

    def _drop_one(self) -> None:
        """End one of the unknown connections: at random, so that a flood meets mostly itself."""
        if unknown := list(self._unknown):
            dropped = random.choice(unknown)
            self._unknown.discard(dropped)
            with contextlib.suppress(OSError):
                dropped.shutdown(socket.SHUT_RDWR)

    def _greet(self, connection: socket.socket, address: str) -> None:
        """Find out whether a connection is of the run, within a short time."""
        until = min(self._until, time.monotonic() + BEAT)
        try:
            channel = Channel(connection, self._secret.value, False, until)
            process = _process(channel.receive(until), channel)
            channel.send({})
        except (OSError, ValueError):
            self._refused.append(address.removeprefix("::ffff:"))  # IPv4 as IPv6
            close(connection)
            self._unknown.discard(connection)
        else:
            self._unknown.discard(connection)  # before it is known: what is unknown is dropped
            self._known.put(process)


def _process(message: dict[str, Any], channel: Channel) -> Joined:
    match message:
        case {"number": int(number), "flags": [*flags]} if all(isinstance(f, str) for f in flags):
            return Joined(number, flags, channel)
    raise Nonsense


def listening(address: str, port: int) -> socket.socket:
    """A listener at an address of this machine; "::" stands for all addresses, IPv4 and IPv6."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, dualstack_ipv6=address == "::")


def listed(numbers: list[int], count: int) -> str:
    """Numbers in words; the first of `count` where those are more.

    >>> listed([1, 2, 5], 3), listed([1, 2], 9)
    ('1, 2 and 5', '1, 2 and 7 more')
    """
    words = [str(number) for number in numbers]
    last = words.pop() if len(words) == count else f"{count - len(words)} more"
    return ", ".join(words) + f" and {last}"
