"""Several processes of Python, that meet at a port and end with the test."""

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def processes(count, *arguments, environment=None):
    """Start `python ARGUMENTS` that many times, with NUMBER in the arguments replaced by the number
    of the process; kill those that are left at the end."""
    with contextlib.ExitStack() as stack:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = []
        for number in range(count):
            command = [str(argument).replace("NUMBER", str(number)) for argument in arguments]
            one = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **pipes)
            stack.callback(one.communicate)
            stack.callback(one.kill)
            started.append(one)
        yield started
