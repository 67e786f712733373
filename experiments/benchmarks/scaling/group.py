"""Processes that train together, asked for rounds in turn with other such groups."""

import contextlib
import itertools
import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.benchmarks.benchmarking import Others
from experiments.benchmarks.scaling.link import Link
from experiments.benchmarks.speed.suite import as_json
from experiments.benchmarks.speed.turns import REST_SECONDS, Child, Gone
from experiments.benchmarks.speed.workloads import Workload


class Setup(NamedTuple):
    """So many processes with so many virtual devices each."""

    devices: int = 1
    processes: int = 1

    @property
    def total(self) -> int:
        return self.devices * self.processes

    @property
    def title(self) -> str:
        """
        >>> Setup(8).title, Setup(processes=2).title
        ('8 devices', '2 processes')
        """
        if self.processes > 1:
            return f"{self.processes} processes"
        return f"{self.devices} device{'s' * (self.devices > 1)}"


class Question(NamedTuple):
    """A round of a method's, by so many workers in all."""

    method: str
    workers: int
    slow: bool = False  # whether over the slow link


class Answers(NamedTuple):
    """What a group said."""

    seconds: dict[Question, list[float]]  # of a round, one a turn
    collectives: dict[Question, Any]  # (kind, bytes, devices, times) of a round
    failure: str | None = None


class Group:
    """The processes of a setup; over a link, each in its namespace."""

    def __init__(self, workload: Workload, setup: Setup, limit: float, link: Link | None = None):
        self._workload, self._setup, self._limit, self._link = workload, setup, limit, link
        self._joined = False
        self.children: list[Child] = []

    def start(self) -> None:
        setup, link = self._setup, self._link
        host = link.address(0) if link else "127.0.0.1"
        command = [
            *(sys.executable, "-m", "experiments.benchmarks.scaling.contender"),
            *(f"--workload={as_json(self._workload)}", f"--devices={setup.devices}"),
            *(f"--processes={setup.processes}", f"--coordinator={host}:{_free_port()}"),
        ]
        for number in range(setup.processes):
            own = [*command, f"--process={number}"]
            own = [*link.within(number), *own] if link else own
            self.children.append(Child(own, self._limit))

    def ask(self, question: Question) -> tuple[float, Any]:
        """The seconds of a round, until the last process is done, and its collectives; raises
        Gone."""
        if not self._joined:
            self._hear()
            self._joined = True
        if self._link:
            self._link.slow(question.slow)
        for child in self.children:
            child.tell(json.dumps([question.method, question.workers]))
        heard = self._hear()
        return max(answer["seconds"] for answer in heard), heard[0]["collectives"]

    def _hear(self) -> list[dict[str, Any]]:
        return [child.answer() for child in self.children]

    def close(self) -> None:
        for child in self.children:
            child.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def ask_in_turn(
    workload: Workload,
    questions: Mapping[Setup, Sequence[Question]],
    repeats: int,
    limit: float,
    link: Link | None = None,
) -> tuple[dict[Setup, Answers], float | None]:
    """Start the groups, then ask each its questions in turn with the others, over and over again.

    A first answer to each does not count: it compiles. A group of which one process does not answer
    within the limit, in seconds, is ended and left out.

    Returns:
      What each said; the part of the machine's cores that others used during the turns, if known.
    """
    said = {setup: Answers({q: [] for q in asked}, {}) for setup, asked in questions.items()}
    groups = {setup: Group(workload, setup, limit, link) for setup in questions}
    abreast = itertools.zip_longest(*([(s, q) for q in asked] for s, asked in questions.items()))
    turn = [one for row in abreast for one in row if one]
    with contextlib.ExitStack() as stack:
        for group in groups.values():
            stack.callback(group.close)
            group.start()
        _take(turn, groups, said)
        others = Others([child.pid for group in groups.values() for child in group.children])
        for _ in range(repeats):
            _take(turn, groups, said, counts=True)
        return said, others.share()


def _take(
    turn: Sequence[tuple[Setup, Question]],
    groups: dict[Setup, Group],
    said: dict[Setup, Answers],
    counts: bool = False,
) -> None:
    """Ask everyone everything once; who does not answer is asked no more."""
    for setup, question in turn:
        if setup not in groups:
            continue
        time.sleep(REST_SECONDS)
        try:
            seconds, said[setup].collectives[question] = groups[setup].ask(question)
        except Gone as reason:
            said[setup] = said[setup]._replace(failure=str(reason))
            groups.pop(setup).close()
            continue
        if counts:
            said[setup].seconds[question].append(seconds)
