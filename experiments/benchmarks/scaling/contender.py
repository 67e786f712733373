"""One of the processes that train together, which the benchmark asks for a round at a time.

It says on a line of JSON that it has joined the others. Then it answers every line on its standard
input, a method and a number of workers in JSON, with the seconds of one round, and what it says to
others: python -m experiments.benchmarks.scaling.contender --workload=mlp --devices=2
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable

import jax
import optax
from absl import flags
from absl.flags import FLAGS

from experiments.benchmarks.compression_costs import methods
from experiments.benchmarks.speed.contender import parse_workload
from experiments.benchmarks.speed.in_jax import gradient_of
from experiments.benchmarks.speed.turns import answers
from experiments.benchmarks.speed.workloads import (
    LEARNING_RATE,
    Workload,
    initial_params,
    make_indices,
    make_pool,
)
from experiments.launching.command_line import run_tool
from experiments.launching.program_cache import keep_programs
from experiments.launching.starting import be_patient
from jaxlocal import Layout, RoundFn, make_mesh
from jaxlocal.types import Tree

LOCAL_STEPS = "local_steps"  # the steps of local_sgd without what ends its rounds


class Training:
    """Rounds of a method, its workers spread over all devices of all processes."""

    def __init__(self, round_fn: RoundFn, workload: Workload, params: Tree, whole: bool = True):
        self._round_fn, self._workload, self._whole, self._turn = round_fn, workload, whole, 0
        self._state = round_fn.init(params, jax.random.key(0))

    def seconds(self) -> float:
        """Of a round; of its steps alone where it is not a whole one."""
        indices = make_indices(self._workload, self._turn)
        batches = indices.reshape(len(indices), *self._round_fn.layout.shape, -1)
        self._turn += 1
        start = time.perf_counter()
        self._state, _ = self._round_fn.local_steps(self._state, batches)
        if self._whole:
            self._state, _ = self._round_fn.end_round(self._state)
        jax.block_until_ready(self._state)
        return time.perf_counter() - start

    def said(self) -> list[tuple[str, int, int, int]]:
        """The collectives of a round: kind, bytes, devices that take part, how often."""
        if not self._whole:
            return []
        devices = self._round_fn.mesh.shape
        return [
            (one.kind, one.nbytes, math.prod(devices[axis] for axis in one.axes), one.times)
            for one in self._round_fn.collectives(self._state, self._workload.steps)
        ]


def trainings(workload: Workload) -> Callable[[str, int], Training]:
    """The training by a method of so many workers, made when it is first asked for."""
    params, pool = initial_params(workload), make_pool(workload)
    named = methods(gradient_of(workload), optax.sgd(LEARNING_RATE), workload.steps)

    @functools.cache
    def compiled(method: str, workers: int) -> RoundFn:
        layout = Layout(workers_per_hub=workers)
        mesh = make_mesh(layout, shape=(1, len(jax.devices())))
        return RoundFn(named[method], layout, mesh, pool)

    @functools.cache
    def of(method: str, workers: int) -> Training:
        sized, whole = workload._replace(workers=workers), method != LOCAL_STEPS
        round_fn = compiled(method if whole else "local_sgd", workers)
        return Training(round_fn, sized, params, whole)

    return of


def train() -> int:
    """Answer until no one asks any more."""
    workload = parse_workload(FLAGS.workload)
    answer = answers()
    be_patient()
    keep_programs()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    if FLAGS.processes > 1:
        jax.distributed.initialize(
            *(FLAGS.coordinator, FLAGS.processes, FLAGS.process),
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=3600,  # the benchmark itself ends those that don't answer
        )
    answer(devices=len(jax.devices()))
    of = trainings(workload)
    for line in sys.stdin:
        training = of(*json.loads(line))
        answer(seconds=training.seconds(), collectives=training.said())
    return 0


def main() -> None:
    flags.DEFINE_string("workload", "mlp", "A name, or a workload's fields in JSON.")
    flags.DEFINE_integer("devices", 1, "Virtual devices of this process.")
    flags.DEFINE_integer("processes", 1, "How many train together.")
    flags.DEFINE_integer("process", 0, "Which of them this is.")
    flags.DEFINE_string("coordinator", None, "Where process 0 is met, HOST:PORT.")
    run_tool(train, lambda: (__doc__ or "").strip())


if __name__ == "__main__":
    main()
