"""What a plan's rounds send between devices: promised by the ledger, and read off their compiled
programs."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.building.job import Job, make_round_fn, model_shapes
from experiments.plotting.display import number
from experiments.running.feeding import Feed
from jaxlocal import ConfigurationError
from jaxlocal.communication.accounting import by_kind
from jaxlocal.communication.audit import audit
from jaxlocal.training.loop import schedule


def audited(job: Job) -> dict[str, Any]:
    """The first round of a job, compiled for this machine's devices.

    Raises:
      ConfigurationError: a job without a model, of which there is no program.
    """
    if job.model is None:
        raise ConfigurationError(
            f"--audit compiles the round of a model, and --parameters={job.config.parameters} "
            f"plans without one"
        )
    with Feed(job) as feed:
        round_fn = make_round_fn(job, feed.pool)
        steps = next(schedule(job.method, job.steps))
        state = round_fn.shapes(*model_shapes(job.config, job.model))
        programs = round_fn.lower(state, feed(0, steps))
    found = [
        one._replace(loops=(times, *one.loops))
        for times, program in programs
        for one in audit(program.compile(), round_fn.mesh)
    ]
    # A round's end that takes turns has all of them in its program, each as a branch.
    turns, ending = job.method.outer.turns, job.method.outer.steps
    others = [one for n in range(1, turns) for one in round_fn.collectives(state, ending, n)]
    promised = by_kind(round_fn.collectives(state, steps) + others)
    sent = by_kind(one.collective() for one in found)
    return {
        "steps": steps,
        "turns": turns,
        "mesh": dict(round_fn.mesh.shape),
        "round": [
            {
                "collective": kind,
                "axes": list(axes),
                "type": dtype,
                "bytes_ledger": promised.get((kind, axes, dtype), 0),
                "bytes_program": sent.get((kind, axes, dtype), 0),
            }
            for kind, axes, dtype in sorted({*promised, *sent})
        ],
        "collectives": [one._asdict() for one in found],
    }


def show_audit(console: Console, figures: dict[str, Any]) -> None:
    """What `audited` gives, as a table."""
    mesh = " × ".join(f"{size} {axis}" for axis, size in figures["mesh"].items())
    title = f"\nsent in a round of {figures['steps']} steps on a mesh of {mesh}"
    if figures["turns"] > 1:
        title += f", at all {figures['turns']} of its ends that take turns"
    console.print(Text(title, style="bold"), soft_wrap=True)
    if not figures["round"]:
        console.print("nothing: all workers are on one device; JAX_NUM_CPU_DEVICES=8 makes eight")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("collective", "over", "type"):
        table.add_column(column)
    for column in ("ledger, bytes", "program, bytes", "times"):
        table.add_column(column, justify="right")
    for row in figures["round"]:
        kind, axes, dtype = row["collective"], row["axes"], row["type"]
        alike = [
            one
            for one in figures["collectives"]
            if (one["kind"], list(one["axes"]), one["dtype"]) == (kind, axes, dtype)
        ]
        times = sum(math.prod(n or 1 for n in one["loops"]) for one in alike)
        sizes = (number(row[f"bytes_{of}"]) for of in ("ledger", "program"))
        table.add_row(kind, ", ".join(axes), dtype, *sizes, number(times))
    console.print(table, highlight=False)
