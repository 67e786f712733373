"""Time slots of a run whose averages wait for the slowest worker."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from jaxlocal.errors import ConfigurationError


class TimeSlots:
    """Count the time slots that a run takes whose averages wait for the slowest worker.

        in every slot, worker i takes a step with probability p_i, until it has all steps of a round
        at a hub average:   the workers of a hub wait for each other
        at a round's end:   and hubs for the hubs with which they mix

    So H steps of a worker take a negative binomial number of slots, and a round of Local SGD the
    largest of K such numbers. MLL-SGD, whose workers skip steps and never wait, takes one slot a
    step instead.

    Args:
      rates: p_i in (0, 1], [D, N] for D hubs of N workers.
      lengths: H of every round, in steps, a multiple of `inner_steps`.
      inner_steps: the steps between hub averages.
      hubs_wait: whether the workers of a hub wait for each other after these steps too, and not
        only at the end of a round.
      links: which hubs wait for which at the end of a round, bool [D, D]; by default all for all.
      seed: of the draws, which do not depend on how the counts are asked for.

    Raises:
      ConfigurationError: rates that are not a grid of probabilities.

    >>> slots = TimeSlots(np.array([[1.0, 0.5]]), lengths=[4, 4])
    >>> [slots(step) for step in (0, 4, 8)]
    [0, 8, 15]
    """

    def __init__(
        self,
        rates: npt.ArrayLike,
        lengths: Iterable[int],
        inner_steps: int = 1,
        hubs_wait: bool = False,
        links: npt.ArrayLike | None = None,
        seed: int = 0,
    ):
        self._rates = np.asarray(rates, np.float64)
        if self._rates.ndim != 2 or not ((self._rates > 0) & (self._rates <= 1)).all():
            raise ConfigurationError(f"rates must be in (0, 1], [hubs, workers], got {rates!r}")
        hubs = len(self._rates)
        self._links = np.ones((hubs, hubs), bool) if links is None else np.asarray(links, bool)
        self._lengths, self._inner_steps, self._hubs_wait = lengths, inner_steps, hubs_wait
        self._seed = seed
        self._restart()

    def __call__(self, step: int) -> int:
        """Slots until every worker has taken `step` steps of the run.

        Steps that ascend cost one pass over the run.
        """
        if step < self._step:
            self._restart()
        while self._step < step:
            self._clock += self._random.geometric(self._rates)
            self._step += 1
            if self._hubs_wait and self._step % self._inner_steps == 0:
                self._clock[:] = self._of_hubs()
            if self._step == self._end:
                self._end_round()
        return int(self._clock.max())

    def _restart(self) -> None:
        self._random = np.random.default_rng(self._seed)
        self._clock = np.zeros(self._rates.shape, np.int64)  # slots of each worker
        self._remaining = iter(self._lengths)
        self._end: int = next(self._remaining, 0)  # of the round
        self._step: int = 0

    def _of_hubs(self) -> np.ndarray:
        """The slots until the slowest worker of each hub is there, [D, 1]."""
        return self._clock.max(1, keepdims=True)

    def _end_round(self) -> None:
        slots = np.where(self._links, self._of_hubs(), 0).max(0)  # [D]: of hub j over its column
        self._clock[:] = slots[:, None]
        self._end += next(self._remaining, 0)
