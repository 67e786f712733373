"""Processes that are asked in turn, over and over again, so that what slows the machine for a while
slows all of them."""

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.benchmarks.benchmarking import Others

REST_SECONDS = 0.05  # between turns, until threads no longer spin for work


class Turns(NamedTuple):
    """What a process said."""

    ready: dict[str, Any]
    answers: list[dict[str, Any]]  # of each turn that counts; none where it failed
    failure: str | None = None

    @property
    def seconds(self) -> list[float]:
        return [answer["seconds"] for answer in self.answers]


class Gone(Exception):
    """A process did not answer; says why."""


def answers() -> Callable[..., None]:
    """What such a process answers by: it writes lines of JSON to what was the standard output;
    whatever else is printed goes to the standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        out.write(json.dumps(values) + "\n")
        out.flush()

    return answer


class Child:
    """A process that writes a line of JSON when it is ready and for every line that it reads."""

    def __init__(self, command: Sequence[str], limit: float):
        self._limit, self._held = limit, b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for the parent, which ends its children
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
        )
        self.pid = self._process.pid

    def ask(self) -> dict[str, Any]:
        """One more round; raises Gone."""
        self.tell()
        return self.answer()

    def tell(self, line: str = "") -> None:
        """A line for it to read; raises Gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
        except BrokenPipeError:
            raise Gone(self._last_words()) from None

    def answer(self) -> dict[str, Any]:
        """The next line that it writes; raises Gone."""
        assert self._process.stdout is not None
        end = time.monotonic() + self._limit
        while b"\n" not in self._held:
            left = max(0.0, end - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise Gone(f"not done in {self._limit:g} s")
            read = self._process.stdout.read(1 << 16)
            if not read:
                raise Gone(self._last_words())
            self._held += read
        line, _, self._held = self._held.partition(b"\n")
        return json.loads(line)

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        return "failed: " + (said.splitlines() or [f"exit status {self._process.returncode}"])[-1]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()


def take_turns(
    commands: Mapping[str, Sequence[str]], repeats: int, limit: float
) -> tuple[dict[str, Turns], float | None]:
    """Start each process when the one before it is ready, then ask them all in turn.

    A first answer of each does not count. A process that does not answer within the limit, in
    seconds, is killed and left out.

    Returns:
      What each said; the part of the machine's cores that others used during the turns, if known.
    """
    turns: dict[str, Turns] = {}
    children: dict[str, Child] = {}
    try:
        for name, command in commands.items():
            children[name] = Child(command, limit)
            _hear(name, children, turns)
        others = Others([child.pid for child in children.values()])
        for repeat in range(repeats + 1):
            for name in list(children):
                time.sleep(REST_SECONDS)
                _hear(name, children, turns, counts=repeat > 0)
        return turns, others.share()
    finally:
        for child in children.values():
            child.close()


def _hear(
    name: str, children: dict[str, Child], turns: dict[str, Turns], counts: bool = False
) -> None:
    """Add one answer of a child, the first of which says that it is ready; or end it."""
    try:
        if name not in turns:
            turns[name] = Turns(children[name].answer(), [])
            return
        answer = children[name].ask()
        if counts:
            turns[name].answers.append(answer)
    except Gone as reason:
        ready = turns[name].ready if name in turns else {}
        turns[name] = Turns(ready, [], str(reason))
        children.pop(name).close()
