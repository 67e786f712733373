"""Connections between the processes of one run: they watch each other, and end together.

Every process keeps a connection to process 0. Both sides send a heartbeat. A process that fails
sends the reason, process 0 forwards it, and all processes end with that sentence. The coordination
service of JAX, which trusts everyone who reaches it, has no port: its bytes are messages too.
"""

import contextlib
import functools
import ipaddress
import os
import socket
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any, NamedTuple, NoReturn

from experiments.launching.channel import Channel, Nonsense
from experiments.launching.relay import Relay, accept_one, connect_to, in_background
from experiments.launching.statuses import FAILED

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
        return self.host == "localhost" or _is_loopback(self.host)

    @property
    def bound(self) -> str:
        """The address at which process 0 listens: the loopback one, or all of its machine."""
        if self.loopback:
            return "127.0.0.1" if self.host == "localhost" else self.host
        return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"

    @property
    def called(self) -> tuple[str, int]:
        """The address to which the others connect."""
        return (self.bound if self.loopback else self.host), self.port


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


class Link:
    """The connections of this process, made by `meet`; they last as long as the process.

    Args:
      channels: of process 0, to all others by their numbers; of another process, to process 0.
    """

    def __init__(self, place: Place, channels: dict[int, Channel]):
        self.place = place
        self._channels = channels
        self._relays: Future[dict[int, Relay]] = Future()
        self._left: set[int] = set()
        self._ending = threading.Lock()
        self._listeners = [
            threading.Thread(target=self._listen, args=one, daemon=True) for one in channels.items()
        ]
        for listener in self._listeners:
            listener.start()
        in_background(self._beat)

    def relay(self, path: str) -> None:
        """Let JAX in every process reach the coordination service of process 0.

        Args:
          path: of a Unix socket, at which process 0 is about to start the service, and to which JAX
            in this process is about to connect.
        """
        connect = functools.partial(connect_to, path, SILENCE)
        open_socket = accept_one(path) if self.place.number else connect
        relays = {n: Relay(open_socket, channel.send) for n, channel in self._channels.items()}
        for relay in relays.values():
            in_background(relay.read)
        self._relays.set_result(relays)

    def leave(self) -> None:
        """Leave the run once JAX has: the end of this process is no failure from here on. Process 0
        leaves last, since the others talk to its service."""
        if self.place.number:
            self._left.add(0)
            self._send_all({"left": True})
        until = time.monotonic() + SILENCE
        for listener in self._listeners if self.place.number == 0 else []:
            listener.join(max(until - time.monotonic(), 0))

    def end(self, sentence: str, status: int) -> NoReturn:
        """End all processes with one sentence; where another process has failed before, with its
        sentence."""
        with self._ending:
            self._send_all({"sentence": sentence, "status": status})
            print("error: " + " ".join(sentence.split()), file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(status)  # a collective with the other processes would never return

    def _listen(self, number: int, channel: Channel) -> None:
        try:
            while number not in self._left:
                self._act(number, channel.receive(time.monotonic() + SILENCE))
            if self._relays.done():
                self._relays.result()[number].close()
            return
        except TimeoutError:
            what = f"has sent nothing for {SILENCE:.0f} s"
        except OSError:
            what = "has ended"
        except ValueError:
            what = "has sent what is no message of this version"
        if number not in self._left:
            self.end(f"process {number} of {self.place.processes} {what}; {RESUMING}", FAILED)

    def _act(self, number: int, message: dict[str, Any]) -> None:
        """Do what a message of a process asks for."""
        match message:
            case {"data": str(text)}:
                self._relays.result(SILENCE)[number].write(text)
            case {"left": True}:
                self._left.add(number)
            case {"sentence": str(sentence), "status": int(status)}:
                self.end(sentence, status if 0 < status < 256 else FAILED)
            case _ if message:  # an empty one is a heartbeat
                raise Nonsense

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            self._send_all({})

    def _send_all(self, message: dict[str, Any]) -> None:
        for channel in self._channels.values():
            with contextlib.suppress(OSError):  # `_listen` notices that the process has ended
                channel.send(message)
