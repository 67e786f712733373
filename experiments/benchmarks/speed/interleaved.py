"""Time the rounds of contenders in alternation, each in its own process."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.benchmarks.child_process import REST_SECONDS, ChildFailed, ChildProcess
from experiments.benchmarks.machine_load import OtherLoad


class Timings(NamedTuple):
    """The replies of one contender."""

    ready: dict[str, Any]  # the reply when it was ready
    replies: list[dict[str, Any]]  # of each repeat; none where it failed
    failure: str | None = None

    @property
    def seconds(self) -> list[float]:
        return [reply["seconds"] for reply in self.replies]


def time_interleaved(
    commands: Mapping[str, Sequence[str]], repeats: int, limit: float
) -> tuple[dict[str, Timings], float | None]:
    """Start each process when the previous one is ready, then request rounds in alternation.

    The first round of each process does not count. A process that does not reply in time is killed
    and left out.

    Args:
      commands: of the processes, by name.
      repeats: rounds of each process that count.
      limit: seconds to wait for one reply.

    Returns:
      The timings by name, and the share of the machine's cores that other processes used during the
      rounds, if known.
    """
    timings: dict[str, Timings] = {}
    children: dict[str, ChildProcess] = {}
    try:
        for name, command in commands.items():
            children[name] = ChildProcess(command, limit)
            _add_reply(name, children, timings)
        load = OtherLoad([child.pid for child in children.values()])
        for repeat in range(repeats + 1):
            for name in list(children):
                time.sleep(REST_SECONDS)
                _add_reply(name, children, timings, counts=repeat > 0)
        return timings, load.share()
    finally:
        for child in children.values():
            child.close()


def _add_reply(
    name: str,
    children: dict[str, ChildProcess],
    timings: dict[str, Timings],
    counts: bool = False,
) -> None:
    """Add the next reply of a child, whose first one means that it is ready; end a child that
    failed."""
    try:
        if name not in timings:
            timings[name] = Timings(children[name].reply(), [])
            return
        reply = children[name].request()
        if counts:
            timings[name].replies.append(reply)
    except ChildFailed as reason:
        ready = timings[name].ready if name in timings else {}
        timings[name] = Timings(ready, [], str(reason))
        children.pop(name).close()
