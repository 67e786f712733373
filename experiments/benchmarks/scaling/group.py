"""Time the rounds of groups of processes, which train together, in alternation."""

import contextlib
import itertools
import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.benchmarks.child_process import REST_SECONDS, ChildFailed, ChildProcess
from experiments.benchmarks.machine_load import OtherLoad
from experiments.benchmarks.scaling.setups import Request, Setup
from experiments.benchmarks.scaling.slow_link import Link
from experiments.benchmarks.workloads import Workload, workload_to_json


class GroupTimings(NamedTuple):
    """The replies of one group."""

    seconds: dict[Request, list[float]]  # of a round, one per repeat
    collectives: dict[Request, Any]  # (kind, bytes, devices, times) of a round
    failure: str | None = None


class Group:
    """The processes of one setup; over a link, each in its network namespace.

    Args:
      workload: what they train.
      setup: their number and their devices.
      limit: seconds to wait for one reply.
      link: between the processes; by default the loopback interface.
    """

    def __init__(self, workload: Workload, setup: Setup, limit: float, link: Link | None = None):
        self._workload, self._setup, self._limit, self._link = workload, setup, limit, link
        self._joined = False
        self.children: list[ChildProcess] = []

    def start(self) -> None:
        """Start the processes without waiting for them."""
        setup, link = self._setup, self._link
        host = link.address(0) if link else "127.0.0.1"
        command = [
            *(sys.executable, "-m", "experiments.benchmarks.scaling.contender"),
            *(f"--workload={workload_to_json(self._workload)}", f"--devices={setup.devices}"),
            *(f"--processes={setup.processes}", f"--coordinator={host}:{_free_port()}"),
        ]
        for number in range(setup.processes):
            prefix = link.command_prefix(number) if link else []
            words = [*prefix, *command, f"--process={number}"]
            self.children.append(ChildProcess(words, self._limit))

    def request(self, request: Request) -> tuple[float, Any]:
        """Run a round in all processes.

        Returns:
          Seconds until the last process is done, and the collectives of the round.

        Raises:
          ChildFailed: a process ended or did not reply in time.
        """
        if not self._joined:
            self._replies()
            self._joined = True
        if self._link:
            self._link.set_slow(request.slow)
        for child in self.children:
            child.send(json.dumps([request.method, request.workers]))
        replies = self._replies()
        return max(reply["seconds"] for reply in replies), replies[0]["collectives"]

    def _replies(self) -> list[dict[str, Any]]:
        return [child.reply() for child in self.children]

    def close(self) -> None:
        """Kill the processes."""
        for child in self.children:
            child.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def time_groups(
    workload: Workload,
    requests: Mapping[Setup, Sequence[Request]],
    repeats: int,
    limit: float,
    link: Link | None = None,
) -> tuple[dict[Setup, GroupTimings], float | None]:
    """Start a group per setup, then request rounds of them in alternation.

    The first reply to each request does not count, since the round compiles. A group is ended and
    left out when one of its processes fails or does not reply in time.

    Args:
      workload: what is trained.
      requests: rounds to time, by setup.
      repeats: how often each request counts.
      limit: seconds to wait for one reply.
      link: between the processes; by default the loopback interface.

    Returns:
      The timings by setup, and the share of the machine's cores that other processes used during
      the rounds, if known.
    """
    timings = {
        setup: GroupTimings({request: [] for request in asked}, {})
        for setup, asked in requests.items()
    }
    groups = {setup: Group(workload, setup, limit, link) for setup in requests}
    order = _alternating(requests)
    with contextlib.ExitStack() as stack:
        for group in groups.values():
            stack.callback(group.close)
            group.start()
        _request_all(order, groups, timings)
        load = OtherLoad([child.pid for group in groups.values() for child in group.children])
        for _ in range(repeats):
            _request_all(order, groups, timings, counts=True)
        return timings, load.share()


def _alternating(requests: Mapping[Setup, Sequence[Request]]) -> list[tuple[Setup, Request]]:
    """The first request of every setup, then the second of every setup, and so on."""
    columns = ([(setup, request) for request in asked] for setup, asked in requests.items())
    return [one for row in itertools.zip_longest(*columns) for one in row if one]


def _request_all(
    order: Sequence[tuple[Setup, Request]],
    groups: dict[Setup, Group],
    timings: dict[Setup, GroupTimings],
    counts: bool = False,
) -> None:
    """Make every request once, and drop the groups that fail."""
    for setup, request in order:
        if setup not in groups:
            continue
        time.sleep(REST_SECONDS)
        try:
            seconds, timings[setup].collectives[request] = groups[setup].request(request)
        except ChildFailed as reason:
            timings[setup] = timings[setup]._replace(failure=str(reason))
            groups.pop(setup).close()
            continue
        if counts:
            timings[setup].seconds[request].append(seconds)
