"""Child processes that answer each line of the benchmark with a line of JSON.

A contender runs in its own process, so that its compilation, memory and threads do not disturb the
others. It replies once when it is ready, and then to each request.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

REST_SECONDS = 0.05  # between requests, until idle threads stop spinning


class ChildFailed(Exception):
    """A child process ended or did not reply in time; the text states the reason."""


def open_replies() -> Callable[..., None]:
    """Make the function by which a child process replies, called with the fields of a reply.

    Replies are lines of JSON on the original standard output. Everything else that the process
    prints goes to the standard error.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**fields: Any) -> None:
        out.write(json.dumps(fields) + "\n")
        out.flush()

    return reply


class ChildProcess:
    """A process that replies with a line of JSON when it is ready and to every line that it reads.

    Args:
      command: the program and its arguments.
      limit: seconds to wait for one reply.
    """

    def __init__(self, command: Sequence[str], limit: float):
        self._limit, self._received = limit, b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its children
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
        )
        self.pid = self._process.pid

    def request(self, line: str = "") -> dict[str, Any]:
        """Send a request and wait for its reply; raises ChildFailed."""
        self.send(line)
        return self.reply()

    def send(self, line: str = "") -> None:
        """Send a request, a line of text; raises ChildFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
        except BrokenPipeError:
            raise ChildFailed(self._last_error()) from None

    def reply(self) -> dict[str, Any]:
        """Wait for the next reply and return its fields; raises ChildFailed."""
        assert self._process.stdout is not None
        end = time.monotonic() + self._limit
        while b"\n" not in self._received:
            left = max(0.0, end - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise ChildFailed(f"not done in {self._limit:g} s")
            read = self._process.stdout.read(1 << 16)
            if not read:
                raise ChildFailed(self._last_error())
            self._received += read
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def _last_error(self) -> str:
        """The last line that the process printed to its standard error, or its exit status."""
        self._process.wait()
        self._errors.seek(0)
        printed = self._errors.read().decode(errors="replace").strip()
        status = f"exit status {self._process.returncode}"
        return "failed: " + (printed.splitlines() or [status])[-1]

    def close(self) -> None:
        """Kill the process with those that it has started, and close its streams."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()
