"""Forward the connections of JAX's coordination service over the links between processes."""

import base64
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from experiments.launching.channel import close


class Relay:
    """One end of a connection to the coordination service: a socket of this machine, whose bytes go
    to the other end as messages.

    The end of the connection is not forwarded: at it JAX's client would end this process with a
    message that hides the cause.

    Args:
      open_socket: makes the socket, once; it may wait.
      send: sends a message to the other end.
    """

    def __init__(
        self, open_socket: Callable[[], socket.socket], send: Callable[[dict[str, Any]], None]
    ):
        self._open, self._send = open_socket, send
        self._socket: socket.socket | None = None
        self._opening = threading.Lock()

    def write(self, text: str) -> None:
        """Write the bytes of a message of the other end."""
        with contextlib.suppress(OSError):
            self._connected().sendall(base64.b64decode(text))

    def read(self) -> None:
        """Send the bytes that arrive, as long as there are any."""
        with contextlib.suppress(OSError):
            while data := self._connected().recv(1 << 15):
                self._send({"data": base64.b64encode(data).decode()})

    def close(self) -> None:
        """End the connection to the service, which waits for that when it ends."""
        if self._socket:
            close(self._socket)

    def _connected(self) -> socket.socket:
        with self._opening:
            self._socket = self._socket or self._open()
            return self._socket


def accept_one(path: str) -> Callable[[], socket.socket]:
    """Listen at a path; returns what waits for the one connection."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)

    def accept() -> socket.socket:
        with listener:
            return listener.accept()[0]

    return accept


def connect_to(path: str, patience: float) -> socket.socket:
    """Connect to a path at which a server listens within a time.

    Raises:
      OSError: it does not.
    """
    until = time.monotonic() + patience
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def in_background(target: Callable, *arguments: Any) -> None:
    """Call a function in a thread that does not keep the process alive."""
    threading.Thread(target=target, args=arguments, daemon=True).start()
