"""Strangers at a port: what they send, and how.

Each is a function of the address. It returns or raises OSError when the other side has had enough,
or after some seconds.
"""

import contextlib
import json
import os
import random
import socket
import struct
import threading
import time

PATIENCE = 2.0
BEGINNINGS = {
    "a number": b"5\n",
    "null": b"null\n",
    "a list": b"[1,2]\n",
    "brackets": b"[" * 200_000 + b"\n",
    "a hello without a secret": json.dumps({"number": 1, "flags": []}).encode() + b"\n",
    "a greeting": b"jaxlocal 1 " + b"0" * 64 + b"\n",
    "a greeting and a hello": b"jaxlocal 1 " + b"0" * 64 + b'\n00 {"number": 1, "flags": []}\n',
    "half a greeting": b"jaxlocal 1 " + b"0" * 64,
    "another version": b"jaxlocal 2 " + b"0" * 64 + b"\n",
    "a line without an end": b"a" * 3_000_000,
    "zeros": bytes(100_000),
    "no UTF-8": b"jaxlocal 1 \xff\xfe\n\xff \xff\n",
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP/2, as gRPC": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]),
    "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(160),
}


def connected(address):
    connection = socket.create_connection(address, PATIENCE)
    connection.settimeout(PATIENCE)
    return connection


def sending(data):
    """A stranger that sends bytes, and waits for what comes back."""

    def stranger(address):
        with connected(address) as connection:
            connection.sendall(data)
            while connection.recv(1 << 16):
                pass

    return stranger


def noise(address):
    sending(os.urandom(random.choice([1, 8, 100, 10_000, 1_000_000])))(address)


def silent(address):
    sending(b"")(address)


def slow(address):
    with connected(address) as connection:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            connection.sendall(random.choice([b"j", b"{", b"["]))
            time.sleep(0.1)


def hasty(address):
    """Reset the connection at once."""
    with connected(address) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def flood(address):
    """Open many connections, and keep them."""
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connected(address))
        time.sleep(PATIENCE)


def impostor(address):
    """Begin as the pairs of processes that Gloo connects, with the number of a pair."""
    with contextlib.ExitStack() as stack:
        for number in range(64):
            connection = stack.enter_context(connected(address))
            connection.sendall(struct.pack("<q", number))
        time.sleep(PATIENCE)


STRANGERS = {name: sending(data) for name, data in BEGINNINGS.items()} | {
    "noise": noise,
    "silence": silent,
    "slow bytes": slow,
    "a reset": hasty,
    "a flood": flood,
}


@contextlib.contextmanager
def visited(addresses, at_once=4, strangers=STRANGERS):
    """In this context strangers connect to addresses, one after another in each of some threads.

    Args:
      addresses: a function, whose result may change.
    """
    ended = threading.Event()

    def visit():
        while not ended.wait(0.01):
            for address in addresses():
                with contextlib.suppress(OSError):
                    random.choice(list(strangers.values()))(address)

    threads = [threading.Thread(target=visit, daemon=True) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def recorded(address):
    """A port whose one connection goes on to an address; yields the port, and the bytes that were
    sent to the address and back, once they are there."""
    to, back = bytearray(), bytearray()

    def forward(source, sink, record):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                record += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve():
        with contextlib.suppress(OSError):
            near, _ = listener.accept()
            far = socket.create_connection(address, PATIENCE)
            threading.Thread(target=forward, args=(far, near, back), daemon=True).start()
            forward(near, far, to)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], to, back
