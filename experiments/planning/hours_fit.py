"""Fit the known hours of two runs, and predict those of other periods."""

import dataclasses
import math
from typing import Any

from rich.console import Console

from experiments.building.job import Plan, make_round_fn
from experiments.building.schedules import make_period, make_schedule, period_name
from experiments.plotting.display import show_table
from jaxlocal import ConfigurationError, periods
from jaxlocal.communication.accounting import model_bits
from jaxlocal.communication.collective_costs import ALL_REDUCE
from jaxlocal.communication.hours_fit import fit
from jaxlocal.types import MessageBits

# Periods whose hours are predicted: constant H, and rules with the H_base of the run.
CONSTANT = (2, 4, 8, 16, 32)
RULES = ("linear", "quadratic", "cubic", "post_local")


def fitted(plan: Plan, data_parallel: float, planned: float) -> dict[str, Any]:
    """Fit compute and communication to the hours of a run and of data parallelism.

    Args:
      data_parallel: known hours of data parallelism.
      planned: known hours of the planned run.

    Raises:
      ConfigurationError: the workers of the run do not send exactly one model per round.
    """
    model, volume = model_bits(plan.state.params), len(plan.lengths) / plan.steps
    if make_round_fn(plan).stage_bits(plan.state) != (MessageBits(), MessageBits(workers=model)):
        raise ConfigurationError(
            f"--hours_planned={planned:g} is for methods whose workers send exactly one model per "
            f"round, not for {plan.config.method}"
        )
    known = fit((1.0, data_parallel), (volume, planned))
    seconds = 3600 * known.communication / plan.steps
    ring = ALL_REDUCE["ring"].all_reduce(plan.layout.workers)
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
                "communication_volume": count / plan.steps,
                "hours": known.hours(count / plan.steps),
            }
            for name, count in _other_rounds(plan)
        ],
    }


def _other_rounds(plan: Plan) -> list[tuple[str, int]]:
    """Descriptions of other periods, each with the number of its rounds in the same steps."""
    own: dict[str, Any] = dict.fromkeys(("period_coefficient", "warmup_local_steps", "switch_step"))
    local = dataclasses.replace(plan.in_steps, method="local_sgd", **own)
    others = [("constant", steps) for steps in CONSTANT]
    others += [(rule, local.local_steps) for rule in RULES if rule != period_name(plan.config)]
    rate, rounds = make_schedule(local, plan.steps), []
    for rule, steps in others:
        config = dataclasses.replace(local, period=rule, local_steps=steps)
        period = make_period(config, rate, plan.steps)
        if period.description != plan.method.period.description:
            rounds.append((period.description, len(list(periods.lengths(period, plan.steps)))))
    return rounds


def show_fit(console: Console, figures: dict[str, Any]) -> None:
    """Print the figures of `fitted` as tables."""
    link = f"as a ring {figures['ring_gbps']:.3g} Gbit/s per link"
    communication = f"{figures['communication_hours']:.4g} h"
    rows = [
        ("given, data parallel", f"{figures['hours_data_parallel']:g} h"),
        ("given, this run", f"{figures['hours_planned']:g} h"),
        ("compute C", f"{figures['compute_hours']:.4g} h"),
        (
            "communication S of data parallel",
            f"{communication}, {figures['all_reduce_ms']:.4g} ms per average, {link}",
        ),
    ]
    show_table(console, "\nhours fitted, C + communication volume · S", rows)
    rows = [
        (p["period"], f"{p['communication_volume']:.2%}, {p['hours']:.2f} h")
        for p in figures["predictions"]
    ]
    show_table(console, "\npredictions of this fit for other periods, not measured", rows)
