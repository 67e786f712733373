"""Run the rounds of one contender in this process, one for each line on the standard input.

The process writes a line of JSON when it is ready, and another with the seconds of a round for each
line that it reads:

    python -m experiments.benchmarks.speed.contender --contender=vmap --workload=mll_cnn
"""

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from absl.flags import FLAGS

from experiments.benchmarks.child_process import open_replies
from experiments.benchmarks.speed import jax_contenders
from experiments.benchmarks.speed.fingerprint import fingerprint
from experiments.benchmarks.speed.flops import flops_timer, round_flops
from experiments.benchmarks.speed.jax_contenders import Rounds
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
    build: Callable[[Workload, Tree], Rounds] | None  # None: times arithmetic alone
    # The grid of workers that the virtual devices are chosen for; None: one device.
    grid: Callable[[Workload], tuple[int, int]] | None = None
    package: str = ""  # that has to be installed, if any
    methods: tuple[str, ...] = ("local_sgd", "diloco")  # of workloads, that it can run


def _jaxlocal(workload: Workload, params: Tree) -> Rounds:
    return jax_contenders.library_rounds(workload, params, FLAGS.worker_map)


def _torch(workload: Workload, params: Tree) -> Rounds:
    from experiments.benchmarks.speed.torch_contender import torch_rounds

    return torch_rounds(workload, params)


def worker_grid(workload: Workload) -> tuple[int, int]:
    """The workers of one hub."""
    return 1, workload.workers


JAXLOCAL, ARITHMETIC = "jaxlocal", "arithmetic"
CONTENDERS = {
    JAXLOCAL: Contender("jaxlocal", _jaxlocal, worker_grid),
    "vmap": Contender("vmap of plain layers", jax_contenders.vmap_rounds),
    "torch": Contender("PyTorch in turn", _torch, package="torch"),
    "shared": Contender("shared, one device", jax_contenders.shared_model_rounds),
    "shared_parallel": Contender(
        "shared, all devices", jax_contenders.shared_model_rounds, lambda _: (1, cores())
    ),
    ARITHMETIC: Contender("arithmetic alone", None),
}


def compete(contenders: Mapping[str, Contender]) -> int:
    """Run the contender of the flags until the standard input ends."""
    contender = lookup("contender", FLAGS.contender, contenders)
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
    build: Callable[[Workload, Tree], Rounds], workload: Workload, reply: Callable[..., None]
) -> None:
    """Reply with the time of the first round, which compiles, and then with that of each round."""
    params = initial_params(workload)
    baseline = resident_bytes()
    rounds = build(workload, params)
    seconds, losses = _timed(rounds, workload, 0)
    moved = fingerprint(rounds.params(), params) if rounds.params else None
    reset_peak()
    loss = None if losses is None else float(np.mean(losses))
    reply(compile_seconds=seconds, loss=loss, moved=moved, devices=len(jax.devices()))
    for number, _ in enumerate(sys.stdin, 1):
        seconds, _ = _timed(rounds, workload, number)
        reply(seconds=seconds, memory_bytes=peak_bytes_above(baseline))


def _timed(rounds: Rounds, workload: Workload, number: int) -> tuple[float, Any]:
    """The seconds and the losses of the round with that number."""
    indices = make_indices(workload, number)
    start = time.perf_counter()
    losses = rounds.run(indices)
    return time.perf_counter() - start, losses


def main(contenders: Mapping[str, Contender] = CONTENDERS) -> None:
    """Run the command that runs one of some contenders."""
    flags.DEFINE_string("contender", JAXLOCAL, f"Contender to run: {', '.join(contenders)}.")
    flags.DEFINE_string("workload", "mll_cnn", "Name of a workload, or its fields in JSON.")
    flags.DEFINE_string("worker_map", None, "How a device runs the workers of jaxlocal.")
    run_command(partial(compete, contenders), __doc__)


if __name__ == "__main__":
    main()
