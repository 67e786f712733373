"""The hours of a planned run on a cluster, by the cost model of `jaxlocal.communication`."""

import dataclasses
import math
from typing import Any

from rich.console import Console

from experiments.building.job import Plan
from experiments.building.workers import step_rates
from experiments.planning.options import Options
from experiments.planning.step_time import step_time
from experiments.plotting.display import number, show_table
from jaxlocal import ConfigurationError
from jaxlocal.communication import accounting
from jaxlocal.communication.collective_costs import Cluster, CollectiveRun
from jaxlocal.communication.cost_model import Hours, hours
from jaxlocal.parallel.layout import AXES
from jaxlocal.parallel.mesh import largest_mesh
from jaxlocal.types import Message


def on_cluster(plan: Plan, options: Options) -> dict[str, Any]:
    """Predict the hours of a run on a cluster, and those of data parallelism.

    Data parallelism takes the same number of steps, with an all-reduce of a whole model at each.
    A worker of rate p < 1 skips steps, and no other worker waits for it. In data parallelism and
    with `--wait`, where no step is skipped, it needs 1/p times as long, and all workers wait.

    Raises:
      ConfigurationError: workers that do not divide over the devices, or options out of range.
    """
    mesh = _mesh(plan, options.cluster_devices or plan.layout.workers)
    cluster = _cluster(options, math.prod(mesh))
    step = step_time(plan, options.step_ms)
    at_once = plan.layout.workers / cluster.devices
    cluster = dataclasses.replace(cluster, step_seconds=1e-3 * step["median"] * at_once)
    all_steps = dataclasses.replace(cluster, slowdown=_without_skips(plan, cluster, mesh))
    model_bytes = accounting.model_bits(plan.state.params) / 8
    model: CollectiveRun = ("all-reduce", model_bytes, cluster.devices)
    return {
        **{f.name: getattr(cluster, f.name) for f in dataclasses.fields(Cluster)},
        "step_ms": step,
        "planned": _parts(_planned(plan, all_steps if plan.config.wait else cluster, mesh)),
        "data_parallel": _parts(hours([plan.steps], all_steps, [model])),
    }


def _planned(plan: Plan, cluster: Cluster, mesh: tuple[int, int]) -> Hours:
    """The hours of the plan: the sum over the turns of what ends its rounds."""
    method = plan.method
    turns, ending = method.outer.turns, method.outer.steps
    # Where the end of a round takes steps, its messages overlap with them; but not in this method.
    overlaps = plan.config.cser_implementation != "released"
    steps = (method.inner.steps, *((ending, 0) if overlaps else (0, ending)))
    by_turn = [
        hours(plan.lengths[turn::turns], cluster, *collectives(plan, mesh, turn), *steps)
        for turn in range(turns)
    ]
    return Hours(*map(sum, zip(*by_turn, strict=True)))


def collectives(
    plan: Plan, mesh: tuple[int, int], number: int = 0
) -> tuple[list[CollectiveRun], list[CollectiveRun]]:
    """The collectives of one inner stage and of the end of a round, on a mesh of hubs × workers.

    Args:
      number: of the round, counted from 0.
    """
    shape = dict(zip(AXES, mesh, strict=True))

    def runs(messages: list[Message]) -> list[CollectiveRun]:
        return [
            (collective.kind, collective.nbytes, math.prod(shape[axis] for axis in collective.axes))
            for collective in accounting.collectives(messages, plan.layout, shape)
            for _ in range(collective.times)
        ]

    inner, outer = plan.method.inner, plan.method.outer
    return runs(inner.communication(plan.state)), runs(outer.communication(plan.state, number))


def _cluster(options: Options, devices: int) -> Cluster:
    """The cluster of the options, with steps of one second."""
    given = {name: getattr(options, name) for name in ("all_reduce", "jitter")}
    return Cluster(
        options.bandwidth_gbps or 0.0,
        options.latency_us or 0.0,
        1.0,
        devices,
        slowdown=_slowdowns(options.slowdown),
        **{name: value for name, value in given.items() if value is not None},
    )


def _parts(total: Hours) -> dict[str, float]:
    parts = {f"{name}_hours": value for name, value in total._asdict().items()}
    return {**parts, "total_hours": total.total}


def _mesh(plan: Plan, devices: int) -> tuple[int, int]:
    mesh = largest_mesh(plan.layout.shape, devices)
    if math.prod(mesh) != devices:
        hubs, workers = plan.layout.shape
        raise ConfigurationError(
            f"{hubs} hubs × {workers} workers do not divide over --cluster_devices={devices}; "
            f"over {math.prod(mesh)} they would"
        )
    return mesh


def _slowdowns(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigurationError(f"--slowdown={text} must be numbers separated by commas") from None


def _without_skips(plan: Plan, cluster: Cluster, mesh: tuple[int, int]) -> tuple[float, ...]:
    """The slowdown of each device where no step is skipped: a worker of rate p needs 1/p times as
    long."""
    hubs, workers = plan.layout.shape
    rate = step_rates(plan.config, plan.layout)
    blocks = (1 / rate).reshape(mesh[0], hubs // mesh[0], mesh[1], workers // mesh[1])
    factors = blocks.mean((1, 3)).reshape(-1) * cluster.step / cluster.step_seconds
    return tuple(float(factor) for factor in factors)


def show_cluster(console: Console, figures: dict[str, Any]) -> None:
    """Print the figures of `on_cluster` as a table."""
    step, slow = figures["step_ms"], figures["slowdown"]
    source = "given"
    if step["measured_on"] is not None:
        between = f"{number(step['min'])} … {number(step['max'])}"
        source = f"{between}, measured on this machine's {step['measured_on']}, valid only for it"
    rows = [
        ("link", f"{number(figures['bandwidth_gbps'])} Gbit/s, {number(figures['latency_us'])} µs"),
        ("all-reduce", figures["all_reduce"]),
        ("a worker's step", f"{number(step['median'])} ms ({source})"),
        ("jitter of steps", number(figures["jitter"])),
        ("slow devices", ", ".join(f"{factor:g}×" for factor in slow) or "—"),
        ("planned", _shown(figures["planned"])),
        ("data parallel", _shown(figures["data_parallel"])),
    ]
    show_table(console, f"\nhours on a cluster of {figures['devices']} devices, by a model", rows)


def _shown(figures: dict[str, float]) -> str:
    """The hours and their parts, in the largest unit in which the total is at least 1."""
    total = figures["total_hours"]
    units = (("h", 1), ("min", 60), ("s", 3600))
    unit, size = next((u for u in units if total * u[1] >= 1), units[-1])
    parts = (f"{name} {figures[f'{name}_hours'] * size:.3g}" for name in Hours._fields)
    return f"{total * size:.4g} {unit}: {', '.join(parts)}"
