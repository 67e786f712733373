"""What the known hours of two runs predict for others that differ in their periods alone."""

import dataclasses
import math
from typing import Any

from rich.console import Console

from experiments.build import Job, make_round_fn, model_shapes
from experiments.display import show_table
from experiments.schedules import make_period, make_schedule, period_name
from jaxlocal import ConfigurationError, periods
from jaxlocal.cluster import ALL_REDUCE, fit
from jaxlocal.local import bits
from jaxlocal.training import schedule
from jaxlocal.types import Messages

CONSTANT = (2, 4, 8, 16, 32)  # the H, and the rules with the run's H_base, that are predicted
RULES = ("linear", "quadratic", "cubic", "post_local")


def fitted(job: Job, data_parallel: float, planned: float) -> dict[str, Any]:
    """What the known hours of the run and of data parallelism say of compute and communication,
    and what they predict for other periods.

    Raises:
      ConfigurationError: the run says something else than one model a round.
    """
    round_fn, lengths = make_round_fn(job), list(schedule(job.rounds, job.ticks))
    state = round_fn.shapes(*model_shapes(job.config, job.model))
    model = bits(state.params)
    if round_fn.traffic(state) != (Messages(), Messages(workers=model)):
        raise ConfigurationError(
            f"--hours_planned={planned:g} is for methods whose workers say one model a round, and "
            f"nothing else; {job.config.method} is none"
        )
    known = fit((1.0, data_parallel), (len(lengths) / job.ticks, planned))
    seconds = 3600 * known.communication / job.ticks
    ring = ALL_REDUCE["ring"].all_reduce(job.layout.workers)
    return {
        "hours_data_parallel": data_parallel,
        "hours_planned": planned,
        "compute_hours": known.compute,
        "communication_hours": known.communication,
        "all_reduce_ms": 1e3 * seconds,
        "ring_gbps": ring.volume * model / seconds / 1e9 if seconds else math.inf,
        "predictions": [
            {
                "period": name,
                "rounds": count,
                "communication_volume": count / job.ticks,
                "hours": known.hours(count / job.ticks),
            }
            for name, count in _other_rounds(job)
        ],
    }


def _other_rounds(job: Job) -> list[tuple[str, int]]:
    """By their descriptions, the rounds of the same ticks under other periods."""
    local = dataclasses.replace(
        job.config, method="local_sgd", period_coefficient=None, switch_tick=None
    )
    others = [("constant", ticks) for ticks in CONSTANT]
    others += [(rule, local.local_steps) for rule in RULES if rule != period_name(job.config)]
    rate, rounds = make_schedule(local, job.ticks), []
    for rule, ticks in others:
        config = dataclasses.replace(local, period=rule, local_steps=ticks)
        period = make_period(config, rate, job.ticks)
        if period.description != job.rounds.period.description:
            rounds.append((period.description, len(list(periods.lengths(period, job.ticks)))))
    return rounds


def show_fit(console: Console, figures: dict[str, Any]) -> None:
    link = f"as a ring {figures['ring_gbps']:.3g} Gbit/s a link"
    rows = [
        ("given, data parallel", f"{figures['hours_data_parallel']:g} h"),
        ("given, this run", f"{figures['hours_planned']:g} h"),
        ("compute C", f"{figures['compute_hours']:.4g} h"),
        (
            "communication S of data parallel",
            f"{figures['communication_hours']:.4g} h, {figures['all_reduce_ms']:.4g} ms an "
            f"average, {link}",
        ),
    ]
    show_table(console, "\nhours fitted, C + communication volume · S", rows)
    rows = [
        (p["period"], f"{p['communication_volume']:.2%}, {p['hours']:.2f} h")
        for p in figures["predictions"]
    ]
    show_table(console, "\npredictions of this fit for other periods, not measured", rows)
