"""How many hours a planned run takes: on a cluster, by the model of jaxlocal.cluster; or by a fit
of runs whose hours are known."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from absl.flags import FLAGS
from rich.console import Console

from experiments.benchmarks.benchmarking import in_turns, spread_of
from experiments.building.config import Config
from experiments.building.job import Job, build_job, make_round_fn, model_shapes
from experiments.planning.hours_fit import fitted, show_fit
from experiments.plotting.display import number, show_table
from experiments.running.feeding import Feed
from experiments.running.measuring import check_model
from jaxlocal import ConfigurationError
from jaxlocal.communication import accounting
from jaxlocal.communication.collective_costs import ALL_REDUCE, Cluster, CollectiveRun
from jaxlocal.communication.cost_model import Hours, hours
from jaxlocal.parallel.layout import AXES
from jaxlocal.parallel.mesh import largest_mesh
from jaxlocal.training.loop import schedule
from jaxlocal.types import Message, TrainState

SIZES, TURNS = (4, 16), 5  # of what is timed where no step is given: steps, and how often
POSITIVE = ("bandwidth_gbps", "cluster_devices", "step_ms", "hours_data_parallel", "hours_planned")
NEEDS = {"hours_data_parallel": "hours_planned", "hours_planned": "hours_data_parallel"}


class Options(NamedTuple):
    """The flags of the hours, None where they are not given."""

    bandwidth_gbps: float | None = None
    latency_us: float | None = None
    all_reduce: str | None = None
    cluster_devices: int | None = None
    step_ms: float | None = None
    jitter: float | None = None
    slowdown: str | None = None
    hours_data_parallel: float | None = None
    hours_planned: float | None = None


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Register them."""
    real, whole, text = flags.DEFINE_float, flags.DEFINE_integer, flags.DEFINE_string
    told: dict[str, tuple[Callable, str]] = {
        "bandwidth_gbps": (real, "Plan the hours on a cluster too: Gbit/s of a device's link."),
        "latency_us": (real, "Of a message there, in µs. By default 0."),
        "all_reduce": (text, f"How devices average: {', '.join(ALL_REDUCE)}. By default ring."),
        "cluster_devices": (whole, "Its devices. By default one a worker."),
        "step_ms": (real, "Of one worker's step there; by default measured on this machine."),
        "jitter": (real, "Coefficient of variation of a device's steps. By default 0."),
        "slowdown": (text, "How many times as long the first devices' steps take, as in 2,1.5."),
        "hours_data_parallel": (real, "Known hours of data parallelism; with --hours_planned."),
        "hours_planned": (real, "Known hours of this run: predicts those of other periods."),
    }
    for name, (define, about) in told.items():
        define(name, None, about, flag_values=values)


def from_flags(values: flags.FlagValues) -> Options:
    """The options that the flags hold.

    Raises:
      ConfigurationError: one that is not positive, or given without another that it needs.
    """
    options = Options(**{name: values[name].value for name in Options._fields})
    for name, value in options._asdict().items():
        if value is None:
            continue
        if name in POSITIVE and not 0 < value < math.inf:
            raise ConfigurationError(f"--{name} must be a number > 0, got {value}")
        other = NEEDS.get(name, "bandwidth_gbps")
        if getattr(options, other) is None:
            raise ConfigurationError(f"--{name}={value} needs --{other} too")
    return options


def plan_hours(job: Job, options: Options) -> dict[str, Any]:
    """The figures that the options ask for."""
    figures = {}
    if options.bandwidth_gbps is not None:
        figures["cluster"] = on_cluster(job, options)
    if options.hours_planned is not None and options.hours_data_parallel is not None:
        figures["fit"] = fitted(job, options.hours_data_parallel, options.hours_planned)
    return figures


def on_cluster(job: Job, options: Options) -> dict[str, Any]:
    """The hours of the run on a cluster, and beside it of data parallelism: as many steps, a whole
    model's all-reduce at each.

    A step is a slot of the clock: a worker of rate p < 1 makes nobody wait, but needs 1/p slots a
    step on average, and in data parallelism all wait for these.
    """
    mesh = _mesh(job, options.cluster_devices or job.layout.workers)
    cluster = _cluster(options, math.prod(mesh))
    step = _step(job, options.step_ms)
    at_once = job.layout.workers / cluster.devices
    cluster = dataclasses.replace(cluster, step_seconds=1e-3 * step["median"] * at_once)
    rounds = job.method
    state = make_round_fn(job).shapes(*model_shapes(job.config, job.model))
    lengths, turns = list(schedule(rounds, job.steps)), rounds.outer.turns
    stages = rounds.inner.steps, rounds.outer.steps
    by_turn = [
        hours(lengths[turn::turns], cluster, *sent(job, state, mesh, turn), *stages)
        for turn in range(turns)
    ]
    planned = Hours(*map(sum, zip(*by_turn, strict=True)))
    everyone = dataclasses.replace(cluster, slowdown=_of_all_steps(job, cluster, mesh))
    model: CollectiveRun = ("all-reduce", accounting.model_bits(state.params) / 8, cluster.devices)
    return {
        **{f.name: getattr(cluster, f.name) for f in dataclasses.fields(Cluster)},
        "step_ms": step,
        "planned": _parts(planned),
        "data_parallel": _parts(hours([job.steps], everyone, [model])),
    }


def _cluster(options: Options, devices: int) -> Cluster:
    """As the options say, with steps of a second."""
    given = {name: getattr(options, name) for name in ("all_reduce", "jitter")}
    return Cluster(
        options.bandwidth_gbps or 0.0,
        options.latency_us or 0.0,
        1.0,
        devices,
        slowdown=_slowdowns(options.slowdown),
        **{name: value for name, value in given.items() if value is not None},
    )


def sent(
    job: Job, state: TrainState, mesh: tuple[int, int], number: int = 0
) -> tuple[list[CollectiveRun], list[CollectiveRun]]:
    """What crosses the links at one inner stage and at the end of the number-th round on a mesh of
    hubs × workers."""
    shape = dict(zip(AXES, mesh, strict=True))

    def collectives(said: list[Message]) -> list[CollectiveRun]:
        return [
            (one.kind, one.nbytes, math.prod(shape[axis] for axis in one.axes))
            for one in accounting.collectives(said, job.layout, shape)
            for _ in range(one.times)
        ]

    inner, outer = job.method.inner, job.method.outer
    return collectives(inner.communication(state)), collectives(outer.communication(state, number))


def _parts(spent: Hours) -> dict[str, float]:
    parts = {f"{name}_hours": value for name, value in spent._asdict().items()}
    return {**parts, "total_hours": spent.total}


def _mesh(job: Job, devices: int) -> tuple[int, int]:
    mesh = largest_mesh(job.layout.shape, devices)
    if math.prod(mesh) != devices:
        hubs, workers = job.layout.shape
        raise ConfigurationError(
            f"{hubs} hubs × {workers} workers do not divide over --cluster_devices={devices}; "
            f"over {math.prod(mesh)} they would"
        )
    return mesh


def _slowdowns(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigurationError(
            f"--slowdown={text} is no row of numbers separated by commas"
        ) from None


def _of_all_steps(job: Job, cluster: Cluster, mesh: tuple[int, int]) -> tuple[float, ...]:
    """How much longer than t each device takes where no step is left out: a worker that steps
    with probability p at a step needs 1/p of them."""
    hubs, workers = job.layout.shape
    blocks = (1 / job.layout.rate).reshape(mesh[0], hubs // mesh[0], mesh[1], workers // mesh[1])
    factors = blocks.mean((1, 3)).reshape(-1) * cluster.step / cluster.step_seconds
    return tuple(float(factor) for factor in factors)


def _step(job: Job, given: float | None) -> dict[str, Any]:
    """Milliseconds of one worker's step, and on what they were measured."""
    if given is not None:
        return {"median": given, "measured_on": None}
    if job.dataset is None:
        raise ConfigurationError(
            f"--parameters={job.config.parameters} plans a model without building it, whose step "
            f"cannot be measured; give --step_ms"
        )
    device = jax.local_devices()[0]
    return {**spread_of(measure_steps(job)), "measured_on": device.device_kind}


def measure_steps(job: Job) -> list[float]:
    """Milliseconds of a step of one worker of the job, alone on this machine's first device: by the
    difference of many steps and few, turn by turn, compilation left out."""
    job = build_job(_alone(job))
    check_model(job)
    assert job.model is not None
    with Feed(job) as feed:
        round_fn, batches = make_round_fn(job, feed.pool), {n: feed(0, n) for n in SIZES}
        key = jax.random.key(job.config.seed)
        params, model_state = jax.jit(job.model.init)(key)
        state = round_fn.init(params, key, model_state)

        def run_size(size: int) -> Any:
            nonlocal state
            state, _ = round_fn.local_steps(state, batches[size])
            return state.params

        seconds = in_turns({str(n): functools.partial(run_size, n) for n in SIZES}, TURNS)
    few, many = (np.array(seconds[str(n)]) for n in SIZES)
    steps = (many - few) / (SIZES[1] - SIZES[0])
    return list(1e3 * (steps if np.median(steps) > 0 else many / SIZES[1]))


def _alone(job: Job) -> Config:
    """The run of one of its workers that speaks with nobody."""
    kept = [
        field.name
        for field in dataclasses.fields(Config)
        if field.metadata["group"] in ("data", "model", "optimizer") and field.name != "partition"
    ]
    same = {name: getattr(job.config, name) for name in (*kept, "accumulation", "worker_map")}
    return Config(workers=1, period="constant", steps=max(job.steps, SIZES[1]), **same)


def show_hours(console: Console, figures: dict[str, Any]) -> None:
    """Those of `plan_hours` as tables."""
    if "cluster" in figures:
        _show_cluster(console, figures["cluster"])
    if "fit" in figures:
        show_fit(console, figures["fit"])


def _show_cluster(console: Console, figures: dict[str, Any]) -> None:
    step, slow = figures["step_ms"], figures["slowdown"]
    told = "given"
    if step["measured_on"] is not None:
        between = f"{number(step['least'])} … {number(step['most'])}"
        told = f"{between}, measured on this machine's {step['measured_on']}, and true for it only"
    rows = [
        ("link", f"{number(figures['bandwidth_gbps'])} Gbit/s, {number(figures['latency_us'])} µs"),
        ("all-reduce", figures["all_reduce"]),
        ("a worker's step", f"{number(step['median'])} ms ({told})"),
        ("jitter of steps", number(figures["jitter"])),
        ("slow devices", ", ".join(f"{factor:g}×" for factor in slow) or "—"),
        ("planned", _shown(figures["planned"])),
        ("data parallel", _shown(figures["data_parallel"])),
    ]
    show_table(console, f"\nhours on a cluster of {figures['devices']} devices, by a model", rows)


def _shown(figures: dict[str, float]) -> str:
    """In a unit in which one can read the total."""
    total = figures["total_hours"]
    units = (("h", 1), ("min", 60), ("s", 3600))
    unit, size = next((u for u in units if total * u[1] >= 1), units[-1])
    parts = (f"{name} {figures[f'{name}_hours'] * size:.3g}" for name in Hours._fields)
    return f"{total * size:.4g} {unit}: {', '.join(parts)}"
