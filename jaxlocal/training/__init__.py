"""Rounds and runs: the compiled round, the host's loop over rounds, evaluation and checkpoints."""

from jaxlocal.training.checkpoints import Checkpoints
from jaxlocal.training.evaluation import Evaluation, Reestimation
from jaxlocal.training.loop import Dispatch, Diverged, Progress, dispatches, run, schedule
from jaxlocal.training.round import RoundFn

__all__ = [
    "Checkpoints",
    "Dispatch",
    "Diverged",
    "Evaluation",
    "Progress",
    "Reestimation",
    "RoundFn",
    "dispatches",
    "run",
    "schedule",
]
