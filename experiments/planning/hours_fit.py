"""What the known hours of two runs predict for others that differ in their periods alone."""

import dataclasses
import math
from typing import Any

from rich.console import Console

from experiments.building.job import Job, make_round_fn, model_shapes
from experiments.building.schedules import make_period, make_schedule, period_name
from experiments.plotting.display import show_table
from jaxlocal import ConfigurationError, periods
from jaxlocal.communication.accounting import model_bits
from jaxlocal.communication.collective_costs import ALL_REDUCE
from jaxlocal.communication.hours_fit import fit
from jaxlocal.training.loop import schedule
from jaxlocal.types import MessageBits

CONSTANT = (2, 4, 8, 16, 32)  # the H, and the rules with the run's H_base, that are predicted
RULES = ("linear", "quadratic", "cubic", "post_local")


def fitted(job: Job, data_parallel: float, planned: float) -> dict[str, Any]:
    """What the known hours of the run and of data parallelism say of compute and communication,
    and what they predict for other periods.

    Raises:
      ConfigurationError: the run says something else than one model a round.
    """
    round_fn, lengths = make_round_fn(job), list(schedule(job.method, job.steps))
    state = round_fn.shapes(*model_shapes(job.config, job.model))
    model = model_bits(state.params)
    if round_fn.stage_bits(state) != (MessageBits(), MessageBits(workers=model)):
        raise ConfigurationError(
            f"--hours_planned={planned:g} is for methods whose workers say one model a round, and "
            f"nothing else; {job.config.method} is none"
        )
    known = fit((1.0, data_parallel), (len(lengths) / job.steps, planned))
    seconds = 3600 * known.communication / job.steps
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
                "communication_volume": count / job.steps,
                "hours": known.hours(count / job.steps),
            }
            for name, count in _other_rounds(job)
        ],
    }


def _other_rounds(job: Job) -> list[tuple[str, int]]:
    """By their descriptions, the rounds of the same steps under other periods."""
    local = dataclasses.replace(
        job.config, method="local_sgd", period_coefficient=None, switch_step=None
    )
    others = [("constant", steps) for steps in CONSTANT]
    others += [(rule, local.local_steps) for rule in RULES if rule != period_name(job.config)]
    rate, rounds = make_schedule(local, job.steps), []
    for rule, steps in others:
        config = dataclasses.replace(local, period=rule, local_steps=steps)
        period = make_period(config, rate, job.steps)
        if period.description != job.method.period.description:
            rounds.append((period.description, len(list(periods.lengths(period, job.steps)))))
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
