"""The checkpoints of a run: when it is saved, and from where it resumes."""

import contextlib
import math
from pathlib import Path
from typing import Any

import jax

from experiments.building.job import Job, save_every
from experiments.running.recording import CHECKPOINTS
from jaxlocal import RoundFn
from jaxlocal.training.checkpoints import Checkpoints
from jaxlocal.types import TrainState


class Saver:
    """Save a run, and restore its newest state.

    A run without checkpoints (`--checkpoint_every=0`) saves nothing, but resumes from checkpoints
    that are there.
    """

    def __init__(self, job: Job, folder: Path):
        self._saves = bool(save_every(job))
        self._stack = contextlib.ExitStack()
        self._checkpoints: Checkpoints | None = None
        if self._saves or (folder / CHECKPOINTS).exists():
            checkpoints = Checkpoints(folder / CHECKPOINTS, job.config.keep)
            self._checkpoints = self._stack.enter_context(checkpoints)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints, in ascending order."""
        return self._checkpoints.steps if self._checkpoints else []

    def newest(self, shapes: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state and its notes; None where there is no checkpoint."""
        if self._checkpoints and self._checkpoints.steps:
            return self._checkpoints.restore(shapes)
        return None

    def save(self, state: TrainState, notes: dict[str, Any]) -> None:
        """Save a state and notes about it, if this run saves."""
        if self._checkpoints and self._saves:
            self._checkpoints.save(state, notes)

    def wants(self, round_fn: RoundFn, state: TrainState) -> bool:
        """Whether a state where the run was interrupted can be saved, and is not saved yet."""
        if not (self._checkpoints and self._saves):
            return False
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            return False  # it was donated to a round that has not returned
        step = int(state.step)
        finite = math.isfinite(float(round_fn.consensus_distance(state)))
        return finite and step > 0 and step not in self._checkpoints.steps

    def wait(self) -> None:
        """Wait until all checkpoints are on disk."""
        if self._checkpoints:
            self._checkpoints.wait()
