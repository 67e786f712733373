"""What a run would do and say, without training: rounds, H, communication, parameters, memory.

Takes the flags of experiments.train. Reads no data and runs no model, unless an audit is asked for,
or hours and the time of a step is not given.
"""

import itertools
import json
import math
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console

from experiments.building.compressors import ratio_by_formula
from experiments.building.config import Config
from experiments.building.job import Job, build_job, make_round_fn, measure_every, model_shapes
from experiments.launching.command_line import define_flags, run_binary
from experiments.launching.starting import start
from experiments.planning import hours
from experiments.planning.auditing import audited, show_audit
from experiments.plotting.display import data_size, number, show_table
from experiments.running.recording import finite
from jaxlocal.communication.accounting import model_bits
from jaxlocal.compression import payload_bits
from jaxlocal.errors import unknown
from jaxlocal.training.loop import dispatches, schedule

FORMATS = ("text", "json")
ROWS = 12  # of the H schedule that are printed; JSON has all


def plan(job: Job) -> dict[str, Any]:
    """The figures of a run."""
    lengths = list(schedule(job.method, job.steps))
    round_fn = make_round_fn(job)
    shapes = model_shapes(job.config, job.model)
    state = round_fn.shapes(*shapes)
    pieces = dispatches(round_fn, job.steps, measure_every(job))
    ending = job.method.outer.steps
    programs = {d.steps for d in pieces if not (ending and d.ends_round)}
    said = round_fn.message_bits(state, job.steps, len(lengths))
    model = model_bits(state.params)
    turns = job.method.outer.turns  # rounds in which a whole model is said
    steps_a_model = turns * job.steps / len(lengths)
    return {
        "method": job.config.method,
        "period": job.method.period.description,
        "steps": job.steps,
        "rounds": len(lengths),
        "communication_volume": len(lengths) / (turns * job.steps),
        "turns": turns,
        "local_steps": _segments(lengths),
        "local_steps_max": max(lengths),
        "hubs": job.layout.hubs,
        "workers": job.layout.workers,
        "zeta": job.zeta,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)) // job.layout.workers,
        "bits_model": model,
        "bits_workers": said.workers,
        "bits_hubs": said.hubs,
        "bits_workers_data_parallel": model * job.steps if job.layout.workers > 1 else 0,
        "compression_ratio_formula": ratio_by_formula(job.config, job.compressors, steps_a_model),
        "compression_ratio_counted": model * job.steps / said.workers if said.workers else None,
        "compressors": _compressors(job, shapes[0]),
        "devices": round_fn.mesh.size,
        "mesh": dict(round_fn.mesh.shape),
        "training_programs": len(programs) + 1,
        "memory_bytes": _memory(job, state),
    }


def _compressors(job: Job, params: Any) -> dict[str, dict[str, Any]]:
    """Each compressor's δ on the model's tensors, and the bits of one of its messages."""
    return {
        what: {
            "name": compressor.name,
            "delta": compressor.delta(params),
            "bits": payload_bits(compressor, params),
        }
        for what, compressor in job.compressors.items()
    }


def _segments(lengths: list[int]) -> list[dict[str, int]]:
    """The H schedule as runs of equal H."""
    segments, step = [], 0
    for length, group in itertools.groupby(lengths):
        rounds = len(list(group))
        segments.append({"step": step, "local_steps": length, "rounds": rounds})
        step += rounds * length
    return segments


def _memory(job: Job, state: Any) -> dict[str, int]:
    """Bytes on one device, of what stays there over a run; what a step needs besides depends on
    the model."""

    def here(tree: Any) -> int:
        shards = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree)]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)

    examples = 0
    if job.dataset is not None and not job.config.stream:
        item = 1 if len(job.dataset.input_shape) == 3 else 4  # images are kept as uint8
        one = int(np.prod(job.dataset.input_shape)) * item + 4
        examples = (job.dataset.train_examples + job.dataset.test_examples) * one
    return {
        "parameters": here(state.params),
        "optimizer": here(state.opt_state),
        "model_state": here(state.model_state),
        "anchor": here(state.anchor),
        "memory": here(state.memory),
        "examples": examples,
    }


def show(figures: dict[str, Any]) -> None:
    """The figures as tables."""
    console = Console()
    volume, model = figures["communication_volume"], figures["bits_model"]
    turns = f" / {figures['turns']} fragments" if figures["turns"] > 1 else ""
    memory = figures["memory_bytes"]
    rows = [
        ("period", figures["period"]),
        ("steps", number(figures["steps"])),
        ("rounds", number(figures["rounds"])),
        ("communication volume", f"{volume:.2%} (rounds{turns} / steps)"),
        ("sent by a worker", _said(figures["bits_workers"], model)),
        ("sent by a hub", _said(figures["bits_hubs"], model)),
        ("data parallel, by a worker", _said(figures["bits_workers_data_parallel"], model)),
        ("compression ratio R_C", _ratios(figures)),
        *((f"{what} compressor", _compressor(c)) for what, c in figures["compressors"].items()),
        ("workers", f"{figures['hubs']} hubs × {figures['workers'] // figures['hubs']}"),
        ("ζ of the hub network", "—" if figures["zeta"] is None else f"{figures['zeta']:.4f}"),
        ("parameters", f"{number(figures['parameters'])} ({data_size(model)})"),
        ("devices", f"{number(figures['devices'])}: {_mesh(figures['mesh'])}"),
        ("training programs", number(figures["training_programs"])),
        (
            "memory on a device",
            ", ".join(f"{name} {data_size(8 * size)}" for name, size in memory.items() if size),
        ),
    ]
    show_table(console, f"plan: {figures['method']}", rows)
    segments = figures["local_steps"]
    shown = segments if len(segments) <= ROWS else _thinned(segments)
    more = f", {len(shown)} of {len(segments)} values" if len(shown) < len(segments) else ""
    schedule_rows = [
        (f"from step {number(s['step'])}", f"H = {number(s['local_steps'])}") for s in shown
    ]
    show_table(console, f"\nH schedule{more}", schedule_rows)
    hours.show_hours(console, figures)
    if "audit" in figures:
        show_audit(console, figures["audit"])


def _mesh(sizes: dict[str, int]) -> str:
    return f"{' × '.join(map(str, sizes.values()))} ({' × '.join(sizes)})"


def _said(total: int, model: int) -> str:
    return f"{number(total)} bits ({data_size(total)}, {total / max(1, model):,.0f} models)"


def _ratios(figures: dict[str, Any]) -> str:
    formula, counted = (figures[f"compression_ratio_{by}"] for by in ("formula", "counted"))
    shown = ["—" if ratio is None else number(float(ratio)) for ratio in (formula, counted)]
    return f"{shown[0]} by formula, {shown[1]} by bits"


def _compressor(figures: dict[str, Any]) -> str:
    return (
        f"{figures['name']}, δ ≥ {figures['delta']:.4g}, {number(figures['bits'])} bits a message"
    )


def _thinned(segments: list[dict[str, int]]) -> list[dict[str, int]]:
    """Some of them at even distances, the first and the last included."""
    return [segments[round(i * (len(segments) - 1) / (ROWS - 1))] for i in range(ROWS)]


def main_on(config: Config) -> int:
    output = flags.FLAGS.format
    if output not in FORMATS:
        raise unknown("format", output, FORMATS)
    options = hours.from_flags(flags.FLAGS)
    start([config])
    job = build_job(config)
    figures = plan(job) | hours.plan_hours(job, options)
    if flags.FLAGS.audit:
        figures["audit"] = audited(job)
    print(json.dumps(finite(figures), indent=2)) if output == "json" else show(figures)
    return 0


def main() -> None:
    define_flags()
    flags.DEFINE_string("format", "text", "How to print the plan: text or json.")
    flags.DEFINE_boolean(
        "audit", False, "Compile a round, and tell what it sends between this machine's devices."
    )
    hours.define_flags()
    flags.adopt_module_key_flags(hours)
    run_binary(main_on, __doc__ or "")


if __name__ == "__main__":
    main()
