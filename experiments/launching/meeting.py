"""The start of a run of several processes: all connect to process 0, which compares their flags."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator

from experiments.launching.channel import Channel, Nonsense, close
from experiments.launching.door import Door, Joined, listening
from experiments.launching.link import BEAT, Link, Place
from experiments.launching.secret import HINT, Secret
from jaxlocal import ConfigurationError

SILENT = "it is silent"
TOGETHER = {"together": True}  # what process 0 sends when all are there
AGAIN = 0.2  # seconds until a process tries again to connect


def meet(place: Place, flags: list[str], secret: Secret, patience: float) -> Link:
    """Connect the processes of a run, and check that their flags are the same.

    Args:
      flags: lines "--name=value" that must be the same in all processes.
      secret: that all processes know.
      patience: seconds to wait for the others.

    Raises:
      ConfigurationError: in every connected process: some are missing, or flags differ.
    """
    if place.number == 0:
        return _gather(place, flags, secret, patience)
    until, cause = time.monotonic() + patience, SILENT
    while time.monotonic() < until:
        try:
            return Link(place, {0: _join(place, flags, secret, until, patience)})
        except _Unanswered as error:  # until process 0 has started, or when it is started again
            cause = str(error)
        time.sleep(AGAIN)
    raise ConfigurationError(
        f"the coordinator, process 0 at {place.host}:{place.port}, has not answered process "
        f"{place.number} of {place.processes} for {patience:.0f} s: {cause}"
    )


def _gather(place: Place, flags: list[str], secret: Secret, patience: float) -> Link:
    """Process 0: wait for all other processes, check their flags and answer them together."""
    try:
        listener = listening(place.bound, place.port)
    except OSError as error:
        raise ConfigurationError(
            f"process 0 cannot listen at {place.host}:{place.port}: {os.strerror(error.errno or 0)}"
        ) from None
    with listener:
        door = Door(listener, secret, time.monotonic() + patience)
        joined = door.wait_for(place.processes - 1)
    wrong = _mismatch(place, flags, joined) or door.missing(place, joined, patience)
    for process in joined:
        with contextlib.suppress(OSError):  # it may have ended in the meantime
            process.channel.send({"sentence": wrong} if wrong else TOGETHER)
    if wrong:
        raise ConfigurationError(wrong)
    return Link(place, {process.number: process.channel for process in joined})


def _mismatch(place: Place, flags: list[str], joined: list[Joined]) -> str | None:
    """The sentence about processes that are there twice or have other flags."""
    numbers = [process.number for process in joined]
    wrong = _twice([0, *numbers])
    for process in sorted(joined, key=lambda process: process.number):
        wrong = wrong or _difference(flags, process.number, process.flags)
    strange = [number for number in numbers if not 0 < number < place.processes]
    if strange and not wrong:
        wrong = f"a process with --process_id={strange[0]} joins a run of {place.processes}"
    return wrong


def _twice(numbers: list[int]) -> str | None:
    twice = [number for number in numbers if numbers.count(number) > 1]
    return f"several processes have --process_id={twice[0]}" if twice else None


def _difference(ours: list[str], number: int, theirs: list[str]) -> str | None:
    mine, its = ({line.partition("=")[0]: line for line in lines} for lines in (ours, theirs))
    for name in [*mine, *its]:
        if mine.get(name) != its.get(name):
            shown = [flags.get(name, f"no {name}") for flags in (mine, its)]
            return (
                f"the processes of a run need the same flags, versions and settings: process 0 has "
                f"{shown[0]}, process {number} {shown[1]}"
            )
    return None


class _Unanswered(Exception):
    """Process 0 has not answered; the message is why."""


def _join(place: Place, flags: list[str], secret: Secret, until: float, patience: float) -> Channel:
    """Another process: connect to process 0, and wait until all others are there."""
    # Of several addresses of a host one may be silent; a host that starts is soon tried again.
    soon = min(max(until - time.monotonic(), AGAIN), BEAT)
    try:
        connection = socket.create_connection(place.called, soon)
    except OSError as error:
        raise _Unanswered(error.strerror or SILENT) from None
    with contextlib.ExitStack() as after_errors:
        after_errors.callback(close, connection)
        channel = _known_on(connection, place, flags, secret, until)
        with _explained("it has ended"):
            # Process 0 may have started last, and then waits for the others.
            answer = channel.receive(time.monotonic() + patience + BEAT)
            if "sentence" in answer:
                raise ConfigurationError(str(answer["sentence"]))
            if answer != TOGETHER:
                raise Nonsense
        after_errors.pop_all()
    return channel


def _known_on(
    connection: socket.socket, place: Place, flags: list[str], secret: Secret, until: float
) -> Channel:
    """The channel on a connection, when both sides know that the other one is of this run."""
    soon = min(until, time.monotonic() + BEAT)
    with _explained("it closes the connection"):
        channel = Channel(connection, secret.value, True, soon)
    with _explained(f"its secret is not that from {secret.source}; {HINT}"):
        channel.send({"number": place.number, "flags": flags})
        channel.receive(soon)
    return channel


@contextlib.contextmanager
def _explained(closed: str) -> Iterator[None]:
    """Turn an error of a channel into its cause, `closed` where the connection is closed."""
    try:
        yield
    except TimeoutError:
        raise _Unanswered(SILENT) from None
    except OSError:
        raise _Unanswered(closed) from None
    except Nonsense:
        raise _Unanswered("what it sends is no message of this run") from None
