"""Run the rounds of one contender in this process, one for each line on the standard input.

The process writes a line of JSON when it is ready, and another with the seconds of a round for each
line that it reads:

    python -m experiments.benchmarks.speed.contender --contender=vmap --workload=mll_cnn
"""

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from absl.flags import FLAGS

from experiments.benchmarks.child_process import open_replies
from experiments.benchmarks.speed import jax_contenders
from experiments.benchmarks.speed.flops import flops_timer, round_flops
from experiments.benchmarks.speed.jax_contenders import RunRound
from experiments.benchmarks.speed.process_memory import (
    peak_bytes_above,
    reset_peak,
    resident_bytes,
)
from experiments.benchmarks.workloads import (
    Workload,
    initial_params,
    make_indices,
    parse_workload,
)
from experiments.launching.command_line import run_command
from experiments.launching.starting import cores, use_the_cores
from jaxlocal.errors import lookup
from jaxlocal.types import Tree


class Contender(NamedTuple):
    """A way to run the rounds of a workload."""

    label: str
    build: Callable[[Workload, Tree], RunRound] | None  # None: times arithmetic alone
    # The grid of workers that the virtual devices are chosen for; None: one device.
    grid: Callable[[Workload], tuple[int, int]] | None = None


def _jaxlocal(workload: Workload, params: Tree) -> RunRound:
    return jax_contenders.local_sgd_rounds(workload, params, FLAGS.worker_map)


def _torch(workload: Workload, params: Tree) -> RunRound:
    from experiments.benchmarks.speed.torch_contender import torch_rounds

    return torch_rounds(workload, params)


JAXLOCAL, ARITHMETIC = "jaxlocal", "arithmetic"
CONTENDERS = {
    JAXLOCAL: Contender("jaxlocal", _jaxlocal, lambda workload: (1, workload.workers)),
    "vmap": Contender("vmap of plain layers", jax_contenders.vmap_rounds),
    "torch": Contender("PyTorch in turn", _torch),
    "shared": Contender("shared, one device", jax_contenders.shared_model_rounds),
    "shared_parallel": Contender(
        "shared, all devices", jax_contenders.shared_model_rounds, lambda _: (1, cores())
    ),
    ARITHMETIC: Contender("arithmetic alone", None),
}


def compete() -> int:
    """Run the contender of the flags until the standard input ends."""
    contender = lookup("contender", FLAGS.contender, CONTENDERS)
    workload = parse_workload(FLAGS.workload)
    jax.config.update("jax_enable_compilation_cache", False)  # cold compilation is measured
    if contender.grid:
        use_the_cores([contender.grid(workload)], cores())
    else:
        jax.config.update("jax_num_cpu_devices", 1)
    reply = open_replies()
    if contender.build is None:
        _time_arithmetic(workload, reply)
    else:
        _time_rounds(contender.build, workload, reply)
    return 0


def _time_arithmetic(workload: Workload, reply: Callable[..., None]) -> None:
    measure = flops_timer(workload)
    reply(flops=round_flops(workload))
    for _ in sys.stdin:
        reply(seconds=measure())


def _time_rounds(
    build: Callable[[Workload, Tree], RunRound], workload: Workload, reply: Callable[..., None]
) -> None:
    """Reply with the time of the first round, which compiles, and then with that of each round."""
    params = initial_params(workload)
    baseline = resident_bytes()
    run = build(workload, params)
    seconds, losses = _timed(run, workload, 0)
    reset_peak()
    reply(compile_seconds=seconds, loss=float(np.mean(losses)), devices=len(jax.devices()))
    for number, _ in enumerate(sys.stdin, 1):
        seconds, _ = _timed(run, workload, number)
        reply(seconds=seconds, memory_bytes=peak_bytes_above(baseline))


def _timed(run: RunRound, workload: Workload, number: int) -> tuple[float, Any]:
    """The seconds and the losses of the round with that number."""
    indices = make_indices(workload, number)
    start = time.perf_counter()
    losses = run(indices)
    return time.perf_counter() - start, losses


def main() -> None:
    flags.DEFINE_string("contender", JAXLOCAL, f"Contender to run: {', '.join(CONTENDERS)}.")
    flags.DEFINE_string("workload", "mll_cnn", "Name of a workload, or its fields in JSON.")
    flags.DEFINE_string("worker_map", None, "How a device runs the workers of jaxlocal.")
    run_command(compete, __doc__)


if __name__ == "__main__":
    main()
