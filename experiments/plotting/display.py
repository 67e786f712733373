"""Progress lines and tables on the console."""

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from jaxlocal.training.loop import Progress

LINES_WITHOUT_TERMINAL = 10


class Display:
    """Show the progress of a run: a live line on a terminal, elsewhere about ten plain lines."""

    def __init__(self, steps: int, bits_a_step: int = 0, quiet: bool = False):
        """
        Args:
          steps: of the run.
          bits_a_step: that data parallelism sends, with which compressed messages are compared; 0
            to compare the number of averages.
          quiet: show nothing.
        """
        self.console = Console(quiet=quiet)
        self._steps, self._bits = steps, bits_a_step
        self._accuracy: float | None = None
        self._next_line = 0.0
        self._progress = ProgressBar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("compiling", total=steps)

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Keep the live line on the terminal in this context."""
        with self._progress:
            yield

    def note(self, sentence: str) -> None:
        """Print one line."""
        self.console.print(Text(sentence), soft_wrap=True)

    def show(self, progress: Progress, measured: dict[str, Any] | None) -> None:
        """Show how far the run is, and the newest measurement if there is one."""
        if measured:
            self._accuracy = measured["eval_accuracy"]
        self._progress.update(
            self._task, completed=progress.step, description=self._describe(progress)
        )
        if not self.console.is_terminal and progress.step >= self._next_line:
            self.console.print(self._describe(progress), highlight=False, soft_wrap=True)
            self._next_line += self._steps / LINES_WITHOUT_TERMINAL

    def _describe(self, progress: Progress) -> str:
        accuracy = "" if self._accuracy is None else f" acc {self._accuracy:.3f}"
        sent = progress.message_bits.workers / self._bits if self._bits else progress.round
        saved = (
            f" saved {1 - sent / progress.step:.{1 if self._bits else 0}%}"
            if progress.round
            else ""
        )
        loss = f" loss {progress.loss:.4f}" if progress.loss == progress.loss else ""
        place = f"round {progress.round} step {progress.step}/{self._steps}"
        return f"{place}{loss}{accuracy} H {progress.round_length}{saved}"


def show_table(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """Print a table of names and values."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table, highlight=False)


def number(value: float) -> str:
    """Format an integer with thousands separators, another number with four digits.

    >>> number(1234567), number(0.98765)
    ('1,234,567', '0.9877')
    """
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def data_size(bits: int) -> str:
    """Format a number of bits as bytes, with a decimal unit.

    >>> data_size(8), data_size(8 * 2_500_000)
    ('1 B', '2.5 MB')
    """
    size = bits / 8
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
        size /= 1000
    raise AssertionError


def columns(*names: str) -> Table:
    """A table whose columns, but for the first, are aligned to the right."""
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    return table
