"""The pieces of a round: which of its steps, and whether its end, one program runs."""

from collections.abc import Iterator
from typing import NamedTuple

import jax

from jaxlocal.periods.rounds import length_at
from jaxlocal.stages.compose import NOTHING
from jaxlocal.training import checks
from jaxlocal.types import Method, Tree


class Piece(NamedTuple):
    """What one program runs of a round."""

    times: int  # how often the inner stage is repeated
    ends: bool  # whether the end of the round follows
    measured: bool = False  # of a whole round: whether it reports the distance before its end


Fed = tuple[Piece, Tree, int]  # a piece, its batches and their steps


class Pieces:
    """Cut the rounds of a method into pieces.

    A dispatch costs little and a compilation much. Where H is the same in all rounds, a round is
    one piece unless it is long. Where it changes, steps run in powers of four of inner stages,
    which need half as many compilations as powers of two.

    Args:
      method: of the rounds.
      max_chunk: the most steps of a piece.
      whole: whether a round of a constant H may be one piece.
    """

    def __init__(self, method: Method, max_chunk: int, whole: bool = True) -> None:
        self._method = method
        most = checks.most_at_once(method, max_chunk)
        self._largest = 4 ** ((most.bit_length() - 1) // 2)  # repetitions of the inner stage
        self._whole: int | None = None  # those that are one piece
        if whole and method.period.constant:
            length = length_at(method.period, 0, checks.MOST_STEPS) - method.outer.steps
            times = length // method.inner.steps
            self._whole = times if 0 < times <= most else None

    def is_whole(self, steps: int) -> bool:
        """Whether a round of so many steps is one piece."""
        inner, outer = self._method.inner, self._method.outer
        return self._whole is not None and steps == self._whole * inner.steps + outer.steps

    def chunks(self, steps: int) -> Iterator[int]:
        """The steps of each piece of steps without the end of a round."""
        for size in self._sizes(steps // self._method.inner.steps):
            yield size * self._method.inner.steps

    def of(self, batches: Tree, steps: int, ends: bool) -> Iterator[Fed]:
        """The pieces of some steps, and of the end of the round, which takes the last of them."""
        inner, outer = self._method.inner, self._method.outer
        ends = ends and outer is not NOTHING
        times = (steps - ends * outer.steps) // inner.steps
        if ends and self.is_whole(steps):
            yield Piece(times, True), batches, steps
            return
        start = 0
        for size in self._sizes(times):
            own = size * inner.steps
            yield Piece(size, False), cut(batches, start, own), own
            start += own
        if ends:
            yield Piece(0, True), cut(batches, start, outer.steps), outer.steps

    def _sizes(self, times: int) -> list[int]:
        """The repetitions of the inner stage in each piece."""
        if times == self._whole:
            return [times]
        size, sizes = self._largest, []
        while times:
            while size > times:
                size //= 4
            sizes.append(size)
            times -= size
        return sizes


def cut(batches: Tree, start: int, steps: int) -> Tree:
    """The batches of some steps; nothing for no steps."""
    return jax.tree.map(lambda b: b[start : start + steps], batches) if steps else ()
