"""One contender in a process of its own, which the benchmark asks for a round at a time.

It says on a line of JSON when it is ready, and then answers every line on its standard input with
the seconds of one round:

    python -m experiments.benchmarks.speed.contender --contender=vmap --workload=mll_cnn
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from absl.flags import FLAGS

from experiments.benchmarks.speed import in_jax
from experiments.benchmarks.speed.arithmetic import bound, round_flops
from experiments.benchmarks.speed.turns import answers
from experiments.benchmarks.speed.workloads import WORKLOADS, Workload, initial_params, make_indices
from experiments.launching.command_line import run_tool
from experiments.launching.starting import cores, use_the_cores
from jaxlocal.errors import lookup
from jaxlocal.types import Tree


class Contender(NamedTuple):
    """A way to run a workload's rounds."""

    label: str
    build: Callable[[Workload, Tree], in_jax.Run] | None
    grid: Callable[[Workload], tuple[int, int]] | None = None  # that devices are made for, else one


def _jaxlocal(workload: Workload, params: Tree) -> in_jax.Run:
    return in_jax.workers(workload, params, FLAGS.worker_map)


def _torch(workload: Workload, params: Tree) -> in_jax.Run:
    from experiments.benchmarks.speed.in_torch import workers_in_turn

    return workers_in_turn(workload, params)


JAXLOCAL, ARITHMETIC = "jaxlocal", "arithmetic"
CONTENDERS = {
    JAXLOCAL: Contender("jaxlocal", _jaxlocal, lambda workload: (1, workload.workers)),
    "vmap": Contender("vmap of plain layers", in_jax.plain_vmap),
    "torch": Contender("PyTorch in turn", _torch),
    "shared": Contender("shared, one device", in_jax.shared),
    "shared_parallel": Contender("shared, all devices", in_jax.shared, lambda _: (1, cores())),
    ARITHMETIC: Contender("arithmetic alone", None),
}


def parse_workload(text: str) -> Workload:
    """The workload of that name, or of those fields in JSON."""
    if not text.startswith("{"):
        return lookup("workload", text, WORKLOADS)
    fields = json.loads(text)
    return Workload(**{**fields, "input_shape": tuple(fields["input_shape"])})


def compete() -> int:
    """Answer until no one asks any more."""
    contender = lookup("contender", FLAGS.contender, CONTENDERS)
    workload = parse_workload(FLAGS.workload)
    jax.config.update("jax_enable_compilation_cache", False)  # a cold compilation is measured
    if contender.grid:
        use_the_cores([contender.grid(workload)], cores())
    else:
        jax.config.update("jax_num_cpu_devices", 1)
    answer = answers()
    if contender.build is None:
        measure = bound(workload)
        answer(flops=round_flops(workload))
        for _ in sys.stdin:
            answer(seconds=measure())
        return 0
    params = initial_params(workload)
    before = _memory("VmRSS")
    run = contender.build(workload, params)
    seconds, losses = _timed(run, workload, 0)
    _forget_peak()
    answer(compile_seconds=seconds, loss=float(np.mean(losses)), devices=len(jax.devices()))
    for turn, _ in enumerate(sys.stdin, 1):
        seconds, _ = _timed(run, workload, turn)
        answer(seconds=seconds, memory_bytes=_peak_memory(before))
    return 0


def _timed(run: in_jax.Run, workload: Workload, turn: int) -> tuple[float, Any]:
    indices = make_indices(workload, turn)
    start = time.perf_counter()
    losses = run(indices)
    return time.perf_counter() - start, losses


def _memory(name: str) -> int:
    """Bytes of this process as Linux states them; elsewhere the most so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def _forget_peak() -> None:
    """Start the peak anew: compiling needs more memory than running."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_memory(before: int) -> int:
    """The most bytes that a round held, of an accelerator where it says so, else of the process
    above what it held before."""
    held = [device.memory_stats() for device in jax.devices()]
    if all(held):
        return sum(stats["peak_bytes_in_use"] for stats in held if stats)
    return _memory("VmHWM") - before


def main() -> None:
    flags.DEFINE_string("contender", JAXLOCAL, f"Who runs: {', '.join(CONTENDERS)}.")
    flags.DEFINE_string("workload", "mll_cnn", "A name, or a workload's fields in JSON.")
    flags.DEFINE_string("worker_map", None, "How a device runs jaxlocal's workers.")
    run_tool(compete, lambda: (__doc__ or "").strip())


if __name__ == "__main__":
    main()
