"""Stages, the pieces that training methods are made of, and the combinators that join them.

| stage | steps | what it does |
|---|---|---|
| `local_step` | 1 | a gradient and an optimizer step of every worker |
| `averaged_gradients` | 1 | the same, with the average of all gradients |
| `synced_updates` | 1 | the same, with a partial synchronisation of the updates |
| `sync`, `sync_model_state` | 0 | average the models; the model state alone |
| `partial_average` | 0 | average the part of the models that a compressor keeps |
| `outer_step` | 0 | an outer optimizer steps on the pseudo-gradient |
| `error_feedback` | 0 | send compressed differences; add what is left out to the next message |
| `common_decay` | 0 | weight decay of all models by the same amount, which is not sent |
| `error_reset` | 0 | partially synchronise the differences from the anchor |
| `overlapped` | τ | an outer step of a fragment while local steps run |
| `repeat`, `sequence`, `in_turn` | | stages made of stages |

A stage is a `Stage(init, apply, steps, communication)` of pure functions; a `Method` joins an inner
stage, an outer stage, an optimizer and a period.
"""

from jaxlocal.stages.averaged_gradients import averaged_gradients
from jaxlocal.stages.compose import NOTHING, in_turn, repeat, sequence
from jaxlocal.stages.error_feedback import common_decay, error_feedback
from jaxlocal.stages.error_reset import error_reset, partial_average
from jaxlocal.stages.fragments import fragments_of
from jaxlocal.stages.gradient import GradFn, accumulate, gradients
from jaxlocal.stages.local_step import local_step
from jaxlocal.stages.optimizers import ScheduledOptimizer, fed_adam, scale_by_step, scheduled
from jaxlocal.stages.outer_step import outer_step
from jaxlocal.stages.overlap import overlapped
from jaxlocal.stages.partial_sync import Synced, partial_sync, partial_sync_messages
from jaxlocal.stages.sync import sync, sync_model_state
from jaxlocal.stages.synced_updates import synced_updates
from jaxlocal.types import (
    Compressor,
    Context,
    Info,
    Memory,
    Message,
    Method,
    Mixer,
    Period,
    Stage,
    TrainState,
)

__all__ = [
    "NOTHING",
    "Compressor",
    "Context",
    "GradFn",
    "Info",
    "Memory",
    "Message",
    "Method",
    "Mixer",
    "Period",
    "ScheduledOptimizer",
    "Stage",
    "Synced",
    "TrainState",
    "accumulate",
    "averaged_gradients",
    "common_decay",
    "error_feedback",
    "error_reset",
    "fed_adam",
    "fragments_of",
    "gradients",
    "in_turn",
    "local_step",
    "outer_step",
    "overlapped",
    "partial_average",
    "partial_sync",
    "partial_sync_messages",
    "repeat",
    "scale_by_step",
    "scheduled",
    "sequence",
    "sync",
    "sync_model_state",
    "synced_updates",
]
