"""Measure what the library costs on this machine: python -m experiments.benchmark.

Suite `speed`: rounds of jaxlocal beside those of other ways to train as many workers, each in a
process of its own, in turns; for each workload the seconds of a round, and how many times as fast
jaxlocal is. Suite `compression`: seconds of a partial synchronisation by each compressor beside
those of the gradient of a step, in the same run and in turns; and the peak memory of methods above
Local SGD's. Suite `scaling`: seconds of a step on more and more virtual devices and processes, and
over a link made slow on purpose beside what the model of a cluster says. Prints tables and writes
the figures as JSON.
"""

import os
import platform
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from absl.flags import FLAGS
from rich.console import Console
from rich.text import Text

import jaxlocal
from experiments.benchmarks import compression_costs
from experiments.benchmarks.benchmarking import QUIET, Others, wait_until_idle
from experiments.benchmarks.scaling.link import NoLink, check_speed, slow_link
from experiments.benchmarks.scaling.suite import OVER_LINK, over_link, scale, sized
from experiments.benchmarks.scaling.tables import show_link, show_scaling
from experiments.benchmarks.speed.contender import JAXLOCAL
from experiments.benchmarks.speed.in_jax import local_sgd
from experiments.benchmarks.speed.suite import compare, growth, show_growth, show_workload
from experiments.benchmarks.speed.workloads import WORKLOADS, Workload
from experiments.launching.command_line import FAILED, run_tool
from experiments.plotting.display import data_size, number, show_table
from experiments.running.recording import write_json
from jaxlocal.errors import ConfigurationError, lookup

COMPRESSORS = (
    *("identity", "grbs:64", "random_k:64", "top_k:64", "top_k:64:tensor", "top_k:64:model"),
    *("top_k:64+int8", "sign", "qsgd:4", "int8", "bfloat16", "powersgd:4"),
)


def chosen_workloads(default: Iterable[str]) -> list[Workload]:
    """Those of the flag."""
    names = list(default) if FLAGS.workloads is None else FLAGS.workloads
    if not names:
        raise ConfigurationError(f"--workloads= names none; there are {', '.join(WORKLOADS)}")
    return [lookup("workload", name, WORKLOADS) for name in names]


def speed(console: Console) -> dict[str, Any]:
    """Rounds per second beside other ways', each workload shown when it is done."""
    chosen = chosen_workloads(WORKLOADS)
    for workload in chosen:
        local_sgd(workload, FLAGS.worker_map)  # a mistake is told before anything is measured
    given = (FLAGS.repeats, FLAGS.limit, FLAGS.worker_map)
    before = wait_until_idle(FLAGS.wait_idle)
    parts = []
    for workload in chosen:
        parts.append(compare(workload, *given))
        show_workload(parts[-1], console)
    figures: dict[str, Any] = {"workloads": list(parts), "worker_map": FLAGS.worker_map}
    if FLAGS.growth:
        figures["growth"] = growth(*given)
        show_growth(figures["growth"], console)
        parts.append(figures["growth"])
    during = [part.pop("others") for part in parts]
    figures["complete"] = not any(
        p["contenders"][JAXLOCAL]["failure"] for p in figures["workloads"]
    )
    return {**figures, "others_before": before, "others_during": during}


def compression(console: Console) -> dict[str, Any]:
    """Time and memory of compressed messages."""
    image = (FLAGS.image, FLAGS.image, 3)
    task = compression_costs.make_task(FLAGS.model, image, FLAGS.batch_size)
    small = compression_costs.make_task(FLAGS.memory_model, image, FLAGS.batch_size)
    before, others = wait_until_idle(FLAGS.wait_idle), Others()
    figures = {
        "overhead": compression_costs.overhead(task, FLAGS.compressors, FLAGS.repeats),
        "memory": compression_costs.memory(small, FLAGS.workers),
    }
    show_compression(figures, console)
    return {**figures, "others_before": before, "others_during": [others.share()]}


def show_compression(figures: dict[str, Any], console: Console) -> None:
    time, memory = figures["overhead"], figures["memory"]
    gradient, model = time["gradient"], 32 * time["parameters"]
    rows = [("gradient", f"{gradient['median'] * 1e3:.4g} ms")]
    for name, row in time["compressors"].items():
        share = "{median:.1%} ({least:.1%} to {most:.1%})".format(**row["ratio"])
        said = f", {model / row['bits']:.3g}×" if row["bits"] else ""
        rows.append((name, f"{row['seconds']['median'] * 1e3:.4g} ms, {share}{said}"))
    title = f"{FLAGS.model}, {number(time['parameters'])} parameters, batch {FLAGS.batch_size}"
    what = "time, part of a gradient (least to most), how many times less is said"
    show_table(console, f"\na partial synchronisation of {title}: {what}", rows)
    size = data_size(8 * memory["model_bytes"])
    where = f"{FLAGS.memory_model} of {size}, {memory['workers']} workers on a device"
    show_table(
        console,
        f"\nmemory of {where}: above Local SGD's, in models",
        [(name, _memory(row)) for name, row in memory["methods"].items()],
    )


def _memory(row: dict[str, Any]) -> str:
    kept, peak = row["kept_above"], row["peak_above"]
    return f"kept {kept:+.2f}, peak of a round {peak:+.2f} ({data_size(8 * row['peak_bytes'])})"


def scaling(console: Console) -> dict[str, Any]:
    """What more devices and processes gain, and what a slow link costs."""
    chosen = [sized(workload) for workload in chosen_workloads(["mlp"])]
    check_speed(FLAGS.link_mbps, FLAGS.link_ms)
    before, parts = wait_until_idle(FLAGS.wait_idle), []
    for workload in chosen:
        parts.append(scale(workload, FLAGS.repeats, FLAGS.limit))
        show_scaling(workload, parts[-1], console)
    try:
        linked, missing = over_slow_link(chosen, console), None
    except NoLink as reason:
        linked, missing = [], str(reason)
        console.print(Text(f"\nno link can be made slow here: {missing}"), soft_wrap=True)
    during = [part.pop("others") for part in parts + linked]
    return {
        "workloads": [workload._asdict() for workload in chosen],
        "scaling": parts,
        "link": linked,
        "link_missing": missing,
        "complete": not any(part["failures"] for part in parts + linked),
        "others_before": before,
        "others_during": during,
    }


def over_slow_link(chosen: Sequence[Workload], console: Console) -> list[dict[str, Any]]:
    """The workloads' figures over the link of the flags; raises NoLink."""
    processes, parts = max(setup.processes for setup in OVER_LINK), []
    with slow_link(processes, FLAGS.link_mbps, FLAGS.link_ms) as link:
        if link.ms != FLAGS.link_ms:
            console.print(f"\nwithout --link_ms={FLAGS.link_ms:g}: this kernel has no netem")
        for workload in chosen:
            parts.append(over_link(workload, FLAGS.repeats, FLAGS.limit, link))
            show_link(workload, parts[-1], console)
    return parts


SUITES: dict[str, Callable[[Console], dict[str, Any]]] = {
    "speed": speed,
    "compression": compression,
    "scaling": scaling,
}


def check_output(path: Path) -> None:
    """Figures that took minutes must have a place to go."""
    folder = path.absolute().parent
    if path.name == "" or path.is_dir():
        raise ConfigurationError(f"--output={FLAGS.output} is no name for a file")
    if not folder.is_dir():
        raise ConfigurationError(f"--output={FLAGS.output} is in a folder that does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(f"--output={FLAGS.output} is in a folder that cannot be written")


def benchmark() -> int:
    """Run a suite on a machine that is idle, or say that it is not."""
    run = lookup("suite", FLAGS.suite, SUITES)
    check_output(Path(FLAGS.output))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end the children
    console = Console()
    figures = run(console)
    before, during = (
        figures["others_before"],
        max(filter(None, figures["others_during"]), default=0),
    )
    busy = max(before or 0, during) > QUIET
    if busy:
        console.print(
            f"\nthe machine was busy: others used {before:.0%} of its cores before, up to "
            f"{during:.0%} meanwhile"
        )
    machine = {
        "busy": busy,
        "devices": [device.device_kind for device in jax.devices()],
        "machine": platform.machine(),
        "versions": {"jaxlocal": jaxlocal.__version__, "jax": jax.__version__},
    }
    write_json(Path(FLAGS.output), {"suite": FLAGS.suite, **figures, **machine})
    console.print(FLAGS.output, highlight=False, soft_wrap=True)
    return 0 if figures.get("complete", True) else FAILED


def main() -> None:
    flags.DEFINE_string("suite", "speed", f"What is measured: {', '.join(SUITES)}.")
    flags.DEFINE_list(
        "workloads", None, "Of speed and scaling: what is trained; by default all, and mlp."
    )
    flags.DEFINE_bool("growth", False, "Of speed: also time and memory with more workers.")
    flags.DEFINE_string("worker_map", None, "Of speed: how a device runs jaxlocal's workers.")
    flags.DEFINE_float(
        "limit", 300.0, "Of speed and scaling: seconds to wait for one.", lower_bound=1.0
    )
    flags.DEFINE_string(
        "model", "resnet18_layer_norm", "Of compression: whose gradients and parameters are timed."
    )
    flags.DEFINE_string("memory_model", "mll_cnn", "Of compression: whose memory is counted.")
    flags.DEFINE_integer("image", 32, "Of compression: sides of its images.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Of compression: a worker's batch.", lower_bound=1)
    flags.DEFINE_integer("workers", 4, "Of compression: whose memory is counted.", lower_bound=1)
    flags.DEFINE_list("compressors", list(COMPRESSORS), "Of compression: what is timed.")
    flags.DEFINE_float("link_mbps", 100.0, "Of scaling: Mbit/s of the slow link.")
    flags.DEFINE_float("link_ms", 1.0, "Of scaling: by which it delays a packet, in ms.")
    flags.DEFINE_integer("repeats", 7, "Turns in which each is timed.", lower_bound=1)
    flags.DEFINE_float("wait_idle", 120.0, "Seconds to wait for an idle machine.", lower_bound=0.0)
    flags.DEFINE_string("output", "benchmark.json", "File for the figures.")
    run_tool(benchmark, lambda: (__doc__ or "").strip())


if __name__ == "__main__":
    main()
