"""Measure the speed and the costs of the library on this machine.

    python -m experiments.benchmark --suite=scaling

Suite `speed` times rounds of jaxlocal and of other ways to train as many workers, each in its own
process and in alternation: for each workload the seconds of a round, and how many times as fast
jaxlocal is. Suite `compression` times a partial synchronisation with each compressor and the
gradient of one step, in the same run and in alternation, and counts the peak memory of methods
above that of Local SGD. Suite `compilation` measures how long rounds with each compressor compile.
Suite `start` measures how long new processes take to the end of their first round, with an empty
compilation cache and with a full one.
Suite `scaling` times a step on more and more virtual devices and
processes, and over a link that is slowed down on purpose, next to the prediction of the cost model.
Suite `peers` times the same rounds in jaxlocal, in plain JAX and in other libraries, which
`python -m experiments.benchmarks.peers.install` installs.
Each suite prints tables and writes its figures as JSON.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from absl import flags
from absl.flags import FLAGS
from rich.console import Console

from experiments.benchmarks.compilation import suite as compilation
from experiments.benchmarks.compression import suite as compression
from experiments.benchmarks.peers import suite as peers
from experiments.benchmarks.peers.contender import PEERS
from experiments.benchmarks.peers.workloads import PEER_WORKLOADS
from experiments.benchmarks.report import check_output, write_figures
from experiments.benchmarks.scaling import suite as scaling
from experiments.benchmarks.speed import suite as speed
from experiments.benchmarks.start import suite as start
from experiments.benchmarks.workloads import WORKLOADS
from experiments.launching.command_line import run_command
from experiments.launching.statuses import FAILED
from experiments.launching.stopping import raising
from jaxlocal.errors import ConfigurationError, lookup


def benchmark() -> int:
    """Run the suite of the flags; return the exit status."""
    run = lookup("suite", FLAGS.suite, SUITES)
    output = check_output(FLAGS.output)
    console = Console()
    with raising():  # so that its child processes end too
        figures = run(console)
    write_figures(FLAGS.suite, figures, output, console)
    return 0 if figures.get("complete", True) else FAILED


def _speed(console: Console) -> dict[str, Any]:
    workloads = list(_chosen("workloads", WORKLOADS, WORKLOADS).values())
    options = (FLAGS.repeats, FLAGS.limit, FLAGS.worker_map, FLAGS.growth)
    return speed.run(workloads, *options, FLAGS.wait_idle, console)


def _compression(console: Console) -> dict[str, Any]:
    values: dict[str, Any] = {name: FLAGS[name].value for name in compression.Options._fields}
    return compression.run(compression.Options(**values), FLAGS.wait_idle, console)


def _compilation(console: Console) -> dict[str, Any]:
    return compilation.run(FLAGS.compressors, FLAGS.tensors, FLAGS.wait_idle, console)


def _scaling(console: Console) -> dict[str, Any]:
    workloads = list(_chosen("workloads", WORKLOADS, ["mlp"]).values())
    options = (FLAGS.repeats, FLAGS.limit, FLAGS.link_mbps, FLAGS.link_ms)
    return scaling.run(workloads, *options, FLAGS.wait_idle, console)


def _start(console: Console) -> dict[str, Any]:
    cases = list(start.CASES) if FLAGS.workloads is None else FLAGS.workloads
    known = {name: name for name in (*WORKLOADS, start.TRAIN)}
    chosen = [lookup("workload", name, known) for name in cases]
    return start.run(chosen, FLAGS.repeats, FLAGS.limit, FLAGS.wait_idle, console)


def _peers(console: Console) -> dict[str, Any]:
    workloads = list(_chosen("workloads", PEER_WORKLOADS, PEER_WORKLOADS).values())
    names = list(_chosen("peers", PEERS, PEERS))
    return peers.run(workloads, names, FLAGS.repeats, FLAGS.limit, FLAGS.wait_idle, console)


SUITES: dict[str, Callable[[Console], dict[str, Any]]] = {
    "speed": _speed,
    "compression": _compression,
    "compilation": _compilation,
    "scaling": _scaling,
    "start": _start,
    "peers": _peers,
}


def _chosen(flag: str, known: Mapping[str, Any], default: Iterable[str]) -> dict[str, Any]:
    """What the names in a flag stand for, or the default ones, by name."""
    names = list(default) if FLAGS[flag].value is None else FLAGS[flag].value
    if not names:
        raise ConfigurationError(f"--{flag}= names none; there are {', '.join(known)}")
    return {name: lookup(flag.removesuffix("s"), name, known) for name in names}


def main() -> None:
    flags.DEFINE_string("suite", "speed", f"Suite to run: {', '.join(SUITES)}.")
    flags.DEFINE_integer("repeats", 7, "Number of timings of each program.", lower_bound=1)
    flags.DEFINE_float(
        "wait_idle", 120.0, "Seconds to wait for an idle machine, at most.", lower_bound=0.0
    )
    flags.DEFINE_string("output", "benchmark.json", "File for the figures.")
    _define_speed_and_scaling()
    _define_compression()
    run_command(benchmark, __doc__)


def _define_speed_and_scaling() -> None:
    flags.DEFINE_list(
        "workloads",
        None,
        "Speed, scaling, start, peers: workloads to train; by default all, mlp, four, all.",
    )
    flags.DEFINE_list("peers", None, "Peers: those to run beside jaxlocal; by default all.")
    flags.DEFINE_float(
        "limit", 300.0, "Speed, scaling, start, peers: seconds to wait for a round.", lower_bound=1
    )
    flags.DEFINE_string("worker_map", None, "Speed: how a device runs the workers of jaxlocal.")
    flags.DEFINE_bool("growth", False, "Speed: measure time and memory with more workers too.")
    flags.DEFINE_float("link_mbps", 100.0, "Scaling: rate of the slow link, Mbit/s.")
    flags.DEFINE_float("link_ms", 1.0, "Scaling: delay of a packet on the slow link, ms.")


def _define_compression() -> None:
    flags.DEFINE_string(
        "model", "resnet18_layer_norm", "Compression: model whose synchronisations are timed."
    )
    flags.DEFINE_string("memory_model", "mll_cnn", "Compression: model whose memory is counted.")
    flags.DEFINE_integer("image", 32, "Compression: height and width of its images.", lower_bound=1)
    flags.DEFINE_integer(
        "batch_size", 32, "Compression: examples of one worker in one step.", lower_bound=1
    )
    flags.DEFINE_integer(
        "workers", 4, "Compression: workers of the methods whose memory is counted.", lower_bound=1
    )
    flags.DEFINE_list(
        "compressors", list(compression.COMPRESSORS), "Compression, compilation: compressors."
    )
    flags.DEFINE_integer("tensors", 300, "Compilation: tensors of the model.", lower_bound=1)


if __name__ == "__main__":
    main()
