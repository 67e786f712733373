"""Audit a plan: compare what its rounds should send with what their compiled programs send."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.building.job import Job, Plan, make_round_fn, without_model
from experiments.plotting.display import number
from experiments.running.feeding import Feed
from jaxlocal import RoundFn
from jaxlocal.communication.accounting import by_kind
from jaxlocal.communication.audit import Audited, audit
from jaxlocal.types import Collective


def audited(plan: Plan) -> dict[str, Any]:
    """Compile the first round of a job for this machine's devices, and compare its collectives with
    the accounting.

    Raises:
      ConfigurationError: a plan without a model, which has no program.
    """
    if not isinstance(plan, Job):
        raise without_model(plan.config, "--audit compiles the round of one")
    steps = plan.lengths[0]
    with Feed(plan) as feed:
        round_fn = make_round_fn(plan, feed.pool)
        programs = round_fn.lower(plan.state, feed(0, steps))
    found = [
        collective._replace(loops=(times, *collective.loops))
        for times, program in programs
        for collective in audit(program.compile(), plan.mesh)
    ]
    return {
        "steps": steps,
        "turns": plan.method.outer.turns,
        "mesh": dict(plan.mesh.shape),
        "round": _compared(_accounted(plan, round_fn), found),
        "collectives": [collective._asdict() for collective in found],
    }


def _accounted(plan: Plan, round_fn: RoundFn) -> list[Collective]:
    """The collectives of the first round by the accounting.

    An end of rounds that takes turns has all turns in its program, each as a branch.
    """
    turns, ending = plan.method.outer.turns, plan.method.outer.steps
    others = [
        collective
        for n in range(1, turns)
        for collective in round_fn.collectives(plan.state, ending, n)
    ]
    return round_fn.collectives(plan.state, plan.lengths[0]) + others


def _compared(accounted: list[Collective], found: list[Audited]) -> list[dict[str, Any]]:
    """Bytes by kind, mesh axes and type, of the accounting and of the program."""
    expected = by_kind(accounted)
    compiled = by_kind(collective.collective() for collective in found)
    return [
        {
            "collective": kind,
            "axes": list(axes),
            "type": dtype,
            "bytes_accounting": expected.get((kind, axes, dtype), 0),
            "bytes_program": compiled.get((kind, axes, dtype), 0),
        }
        for kind, axes, dtype in sorted({*expected, *compiled})
    ]


def show_audit(console: Console, figures: dict[str, Any]) -> None:
    """Print the figures of `audited` as a table."""
    mesh = " × ".join(f"{size} {axis}" for axis, size in figures["mesh"].items())
    title = f"\nsent in a round of {figures['steps']} steps on a mesh of {mesh}"
    if figures["turns"] > 1:
        title += f", with all {figures['turns']} turns of its end"
    console.print(Text(title, style="bold"), soft_wrap=True)
    if not figures["round"]:
        console.print("nothing: all workers are on one device; JAX_NUM_CPU_DEVICES=8 makes eight")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("collective", "over", "type"):
        table.add_column(column)
    for column in ("accounting, bytes", "program, bytes", "times"):
        table.add_column(column, justify="right")
    for row in figures["round"]:
        sizes = (number(row[f"bytes_{source}"]) for source in ("accounting", "program"))
        times = number(_times(row, figures["collectives"]))
        table.add_row(row["collective"], ", ".join(row["axes"]), row["type"], *sizes, times)
    console.print(table, highlight=False)


def _times(row: dict[str, Any], collectives: list[dict[str, Any]]) -> int:
    """How often the programs of a round run the collectives of a row."""
    key = row["collective"], row["axes"], row["type"]
    alike = [
        collective
        for collective in collectives
        if (collective["kind"], list(collective["axes"]), collective["dtype"]) == key
    ]
    return sum(math.prod(n or 1 for n in collective["loops"]) for collective in alike)
