"""Rounds and runs: the compiled round, the host's loop over rounds, evaluation and checkpoints."""

from jaxlocal.training.loop import Dispatch, Diverged, Progress, dispatches, run, schedule
from jaxlocal.training.round import RoundFn

__all__ = ["Dispatch", "Diverged", "Progress", "RoundFn", "dispatches", "run", "schedule"]
