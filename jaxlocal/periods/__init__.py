"""Periods: rules for H, the steps between two synchronisations. On the host, in Python ints.

A rule may read the learning rate, by the steps of the run and in float64: the same schedule that
the optimizer follows. Every rule is clipped to the steps that remain, so that training always ends
on a synchronisation.

| period | H of the round that starts at step t, where the learning rate is η_t |
|---|---|
| `constant(H)` | H |
| `qsr` | max(H_base, ⌊(α/η_t)²⌋), the Quadratic Synchronization Rule |
| `linear`, `cubic` | max(H_base, ⌊α/η_t⌋), max(H_base, ⌊(α/η_t)³⌋) |
| `post_local` | 1 until a step, then constant |
| `swap` | 1 until a step, then all steps that remain |
"""

from jaxlocal.periods.fixed import constant, post_local, swap
from jaxlocal.periods.learning_rate import cubic, linear, power, qsr
from jaxlocal.periods.rounds import check_schedule, lengths, of, split
from jaxlocal.periods.schedules import rates

__all__ = [
    "check_schedule",
    "constant",
    "cubic",
    "lengths",
    "linear",
    "of",
    "post_local",
    "power",
    "qsr",
    "rates",
    "split",
    "swap",
]
