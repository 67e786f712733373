"""Rounds and runs: the compiled round, the host's loop over rounds, evaluation and checkpoints."""

from jaxlocal.training.checkpoints import Checkpoints
from jaxlocal.training.dispatching import Dispatch, dispatches, schedule
from jaxlocal.training.evaluation import Evaluation, Reestimation
from jaxlocal.training.loop import Diverged, Progress, run
from jaxlocal.training.round import RoundFn
from jaxlocal.training.running_averages import (
    RunningAverage,
    running_average,
    with_running_averages,
)

__all__ = [
    "Checkpoints",
    "Dispatch",
    "Diverged",
    "Evaluation",
    "Progress",
    "Reestimation",
    "RoundFn",
    "RunningAverage",
    "dispatches",
    "run",
    "running_average",
    "schedule",
    "with_running_averages",
]
