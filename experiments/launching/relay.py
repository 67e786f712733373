"""Forward a port of this machine to another machine."""

import contextlib
import socket
import threading
import time
from typing import Any


def relay(host: str, port: int, patience: float) -> int:
    """Forward a port of this machine to another machine's; return its number.

    Data is forwarded, but not the end of the other side, at which JAX's client would end this
    process with a message that hides the cause.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            near, _ = listener.accept()
            far = _try_to_connect(host, port, patience)
            if far:
                far.settimeout(None)
                in_background(_forward, near, far)
                in_background(_forward, far, near)

    in_background(serve)
    return listener.getsockname()[1]


def _try_to_connect(host: str, port: int, patience: float) -> socket.socket | None:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            return socket.create_connection((host, port), timeout=patience)
        except OSError:  # it has not started yet
            time.sleep(0.05)
    return None


def _forward(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)


def in_background(target: Any, *arguments: Any) -> None:
    """Call a function in a thread that does not keep the process alive."""
    threading.Thread(target=target, args=arguments, daemon=True).start()
