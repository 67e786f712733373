"""Several processes of Python, that meet at a port and end with the test."""

import contextlib
import os
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
        names = ("stdin", "stdout", "stderr")
        pipes = {"text": True} | dict.fromkeys(names, subprocess.PIPE)
        started = []
        for number in range(count):
            command = [str(argument).replace("NUMBER", str(number)) for argument in arguments]
            one = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **pipes)
            stack.callback(one.communicate)
            stack.callback(one.kill)
            started.append(one)
        yield started


def joined(count, folder, flags, environment=None):
    """Start a run of `experiments.train` on some processes, that meet at a free port."""
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    own = (f"--workdir={folder}", f"--process_count={count}", "--process_id=NUMBER")
    arguments = ("-m", "experiments.train", address, *own, *flags)
    return processes(count, *arguments, environment=environment)


def listening(process):
    """The ports at which a process listens, on Linux."""
    sockets, ports = set(), []
    with contextlib.suppress(OSError):  # it may have ended
        for number in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(number))
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/{process.pid}/net/{name}").read_text().splitlines()[1:]:
                _, address, _, state, *_, inode = line.split()[:10]
                if state == "0A" and f"socket:[{inode}]" in sockets:
                    ports.append(int(address.rsplit(":", 1)[1], 16))
    return ports
