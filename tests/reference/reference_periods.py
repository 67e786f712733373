"""Rules of the period and learning-rate schedules as plain Python; see `reference`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from reference import Schedule

Decay = Literal["constant", "cosine", "cosine_step", "linear", "step"]


def constant(steps: int, local_steps: int) -> list[int]:
    """H at every round."""
    return _periods(steps, lambda step: local_steps)


def post_local(steps: int, switch_step: int, local_steps: int) -> list[int]:
    """H = 1 before the switch, then constant: post-local SGD, Lin et al., arXiv 1808.07217."""
    return _periods(steps, lambda step: 1 if step < switch_step else local_steps)


def swap(steps: int, switch_step: int) -> list[int]:
    """H = 1 before the switch, then one average at the end: SWAP, arXiv 2001.02312."""
    return _periods(steps, lambda step: 1 if step < switch_step else steps)


def qsr(
    learning_rate: Schedule,
    steps: int,
    coefficient: float,
    base: int,
    power: float = 2,
    warmup_steps: int = 0,
) -> list[int]:
    """H = max{H_base, ⌊(α/η_t)^power⌋}, t the first step of the round: QSR, arXiv 2310.14423.

    A round that starts in warm-up takes the rule's value at the first step after it.
    """

    def rule(step: int) -> int:
        return max(base, int((coefficient / learning_rate(max(step, warmup_steps))) ** power))

    return _periods(steps, rule)


def guarded(
    learning_rate: Schedule,
    steps: int,
    coefficient: float,
    base: int,
    power: float = 2,
    multiple: int = 1,
    known: int = 10_000,
) -> list[int]:
    """`qsr` for schedules that rise: every round is the longest one that the peaks of its steps
    allow, where the peak of a step is the rate at which the schedule next falls.

    A schedule is known up to a step.
    """

    def peak(step: int) -> float:
        while step + 1 < known and learning_rate(step + 1) >= learning_rate(step):
            step += 1
        return learning_rate(step)

    def allowed(rate: float) -> int:
        wanted = int((coefficient / rate) ** power)
        return max(base, wanted - wanted % multiple)

    def longest(step: int) -> int:
        length, rate = 0, 0.0
        for following in range(step, steps):
            rate = max(rate, peak(following))
            if following - step + 1 > allowed(rate):
                break
            length += 1
        whole = length == steps - step
        return length if whole else length - length % multiple

    return _periods(steps, longest)


def schedule(
    decay: Decay, peak: float, steps: int, warmup_steps: int = 0, floor: float = 1e-6
) -> Schedule:
    """Linear warm-up from the floor to the peak, then the decay (arXiv 2310.14423, appendix).

    cosine, linear: from the peak at the end of warm-up to the floor at `steps`; cosine_step:
    2^round(log2(cosine)), so it starts at the power of two nearest to the peak; step: ×0.1 at
    1/3 and 2/3 of `steps`, counted from step 0.
    """

    def learning_rate(step: int) -> float:
        if step < warmup_steps:
            return floor + (peak - floor) * step / warmup_steps
        if decay == "constant":
            return peak
        if decay == "step":
            return peak * 0.1 ** min(3 * step // steps, 2)
        done = min((step - warmup_steps) / (steps - warmup_steps), 1.0)
        left = 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        rate = floor + (peak - floor) * left
        return 2.0 ** round(math.log2(rate)) if decay == "cosine_step" else rate

    return learning_rate


def _periods(steps: int, rule: Callable[[int], int]) -> list[int]:
    """The rule at the first step of each round, clipped to the steps that remain, at least 1."""
    periods, step = [], 0
    while step < steps:
        periods.append(max(min(rule(step), steps - step), 1))
        step += periods[-1]
    return periods
