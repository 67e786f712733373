"""Stop a command by Ctrl-C (SIGINT) or SIGTERM: one sentence, and exit status 130 or 143.

The first signal ends the process at once where nothing would be lost, and asks a run that trains to
save its state and to end. A second signal always ends the process at once.

A thread acts on the signals. The main thread may be compiling, during which Python's handlers wait,
or in a callback, in which Python ignores what they raise. This file imports nothing that is slow:
signals are handled before everything else is imported.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

WORDS = {signal.SIGINT.value: "interrupted", signal.SIGTERM.value: "terminated"}
NOTED = b"\nending after this step; again to end at once\n"


class Interrupted(KeyboardInterrupt):
    """A signal, where it is raised in the main thread."""

    def __init__(self, number: int):
        super().__init__(WORDS[number])
        self.status = status_of(number)


def status_of(number: int) -> int:
    """The exit status of a command that a signal has ended.

    >>> status_of(signal.SIGINT), status_of(signal.SIGTERM)
    (130, 143)
    """
    return 128 + number


def end_process(number: int) -> NoReturn:
    """End this process, and those that `multiprocessing` has started for it, by a signal."""
    try:
        _kill_children()
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # a live line hides the cursor
        os.write(2, f"error: {WORDS[number]}\n".encode())
    finally:
        os._exit(status_of(number))


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()


def _ignore() -> None:
    """Ignore signals while Python ends: nothing is lost any more, and it would give its handlers up
    and let a signal change the exit status."""
    for number in WORDS:
        signal.signal(number, signal.SIG_IGN)


class _Signals:
    """The signals of this process, and what is done at the next one."""

    def __init__(self) -> None:
        self.watched = False  # by the thread of `watch`
        self.asked = 0  # the first signal
        self.patient = self.raises = self.raised = False
        self.always_patient = False
        self.end: Callable[[int], Any] = end_process

    def watch(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        atexit.register(_ignore)  # called last, since it is registered before everything else
        for number in WORDS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as in a background job of a shell
                signal.signal(number, self._in_main_thread)
        threading.Thread(target=self._read, daemon=True).start()
        self.watched = True

    def _read(self) -> None:
        while True:
            for number in self._reader.recv(1):
                if number in WORDS:
                    self._act(number)

    def _act(self, number: int) -> None:
        again, self.asked = self.asked and not self.always_patient, self.asked or number
        if again or not (self.patient or self.raises or self.raised):
            self.end(number)
        elif self.patient and os.isatty(2):
            os.write(2, NOTED)

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if self.raises and not self.raised:
            self.raised = True
            raise Interrupted(number)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle Ctrl-C in a program of a user, in which no thread watches: note it once."""
        if self.asked or not self.patient:
            raise KeyboardInterrupt
        self.asked = number


_signals = _Signals()
if hasattr(os, "register_at_fork"):  # the signals of a child are not those of this process
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def watch() -> None:
    """Handle SIGINT and SIGTERM from now on; called once, in the main thread."""
    _signals.watch()


def watch_patiently() -> None:
    """Handle SIGTERM as `watch` does, but never end at once; ignore Ctrl-C.

    The process that has started this one handles Ctrl-C and a second signal. A signal to all of
    them comes here twice, as that process passes it on. When that process has gone, as after
    `kill -9`, this one ends too: it would wait for work without end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _signals.patient = _signals.always_patient = True
    _signals.watch()
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    try:
        _kill_children()
    finally:
        os._exit(status_of(signal.SIGTERM))


def asked() -> int:
    """The signal by which this process was asked to end; 0 if it was not."""
    return _signals.asked


@contextlib.contextmanager
def ending_by(end: Callable[[int], Any]) -> Iterator[None]:
    """End this process in another way: `end(number)`, called in any thread."""
    _signals.end, before = end, _signals.end
    try:
        yield
    finally:
        _signals.end = before


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Raise `Interrupted` in the main thread at the first signal, for commands that clean up."""
    _signals.raises = True
    try:
        yield
    finally:
        _signals.raises = False


class Patience:
    """A context in which a run can be asked to end, and saves its state before it does.

    It works in a notebook too, for Ctrl-C.
    """

    def __enter__(self) -> "Patience":
        if _signals.asked and not _signals.always_patient:  # after the end of a run before this one
            _signals.end(_signals.asked)
        self._before: Any = None
        if not _signals.watched and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, _signals.note)
        return self

    def asked(self) -> int:
        """The signal by which this process was asked to end; 0 if it was not.

        Until the first call, a signal ends the process at once, as nothing is lost.
        """
        _signals.patient = True
        return _signals.asked

    def __exit__(self, *_: object) -> None:
        _signals.patient = _signals.always_patient
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if not _signals.watched:
            _signals.asked = 0
