"""Messages of processes that share a secret; nobody else can send, change or repeat one."""

import contextlib
import hmac
import json
import secrets
import socket
import threading
import time
from typing import Any

GREETING = b"jaxlocal 1 "  # what a process sends first, with a random number
LONGEST = 1 << 17  # bytes of a message


class Nonsense(ValueError):
    """What arrived is not a message of a process that knows the secret."""


class Channel:
    """A connection whose messages are signed with a secret.

    Each side begins with a random number. The key of the connection is made of the secret and both
    numbers, so a recorded connection is of no use for another one. A message is a line of JSON
    after its signature, which covers the direction and the position of the message as well.
    Messages are not encrypted.

    Args:
      secret: the same on both sides.
      first: whether this side has made the connection.
      until: the time (`time.monotonic`) when the random number of the other side must be there.

    Raises:
      Nonsense: the other side does not begin with a random number.
      OSError: it closes the connection; TimeoutError: it is silent.
    """

    def __init__(self, connection: socket.socket, secret: bytes, first: bool, until: float):
        # Two objects for one connection, since each has its own timeout.
        self._reader, self._writer = connection, connection.dup()
        self._sending = threading.Lock()
        self._buffer = b""
        self._sent = self._received = 0
        self._first = first
        mine = GREETING + secrets.token_hex(32).encode()
        self._write(mine + b"\n")
        theirs = self._line(until)
        if not theirs.startswith(GREETING) or len(theirs) != len(mine):
            raise Nonsense
        numbers = mine + theirs if first else theirs + mine
        self._key = hmac.digest(secret, numbers, "sha256")

    def send(self, message: dict[str, Any], patience: float = 30.0) -> None:
        """Send a message; any thread may.

        Raises:
          OSError: the connection is closed, or the other side reads nothing for `patience` seconds.
        """
        body = json.dumps(message).encode()
        with self._sending:
            signature = self._signature(self._first, self._sent, body)
            self._sent += 1
            self._write(signature + b" " + body + b"\n", patience)

    def receive(self, until: float) -> dict[str, Any]:
        """The next message; one thread receives at a time.

        Raises:
          Nonsense: it is not signed with the secret, too long, or no JSON object.
          TimeoutError: it has not arrived, as a whole, at the time `until`.
          OSError: the connection is closed.
        """
        signature, _, body = self._line(until).partition(b" ")
        expected = self._signature(not self._first, self._received, body)
        if not hmac.compare_digest(signature, expected):
            raise Nonsense
        self._received += 1
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            raise Nonsense from None
        if not isinstance(message, dict):
            raise Nonsense
        return message

    @property
    def ended(self) -> bool:
        """Whether the other side has closed the connection; no other thread may be receiving."""
        try:
            self._reader.settimeout(0)
            return not self._reader.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """End the connection, for threads that send or receive too."""
        close(self._reader)
        self._writer.close()

    def _signature(self, from_first: bool, position: int, body: bytes) -> bytes:
        signed = b"%d %d %b" % (from_first, position, body)
        return hmac.digest(self._key, signed, "sha256").hex().encode()

    def _write(self, line: bytes, patience: float = 30.0) -> None:
        self._writer.settimeout(patience)
        self._writer.sendall(line)

    def _line(self, until: float) -> bytes:
        while b"\n" not in self._buffer:
            if len(self._buffer) > LONGEST:
                raise Nonsense
            if (left := until - time.monotonic()) <= 0:
                raise TimeoutError
            self._reader.settimeout(left)
            data = self._reader.recv(1 << 16)
            if not data:
                raise ConnectionAbortedError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def close(connection: socket.socket) -> None:
    """End a connection, for other threads and duplicates of the socket too."""
    with contextlib.suppress(OSError):  # it has ended already
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
