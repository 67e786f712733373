"""Run rounds in one of the processes that train together, one for each line on the standard input.

The process writes a line of JSON when it has joined the others. Each line that it reads is a method
and a number of workers in JSON; it replies with the seconds of one round and its collectives:

    python -m experiments.benchmarks.scaling.contender --workload=mlp --devices=2
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

from experiments.benchmarks.child_process import open_replies
from experiments.benchmarks.methods import measured_methods
from experiments.benchmarks.scaling.setups import LOCAL_STEPS
from experiments.benchmarks.workloads import (
    LEARNING_RATE,
    Workload,
    gradient_of,
    initial_params,
    make_indices,
    make_pool,
    parse_workload,
)
from experiments.launching.command_line import run_command
from experiments.launching.program_cache import keep_programs
from experiments.launching.starting import be_patient
from jaxlocal import Layout, RoundFn, make_mesh
from jaxlocal.types import Tree


class Training:
    """Rounds of a method whose workers are spread over all devices of all processes.

    Args:
      round_fn: the method's.
      workload: what is trained.
      params: that all workers start from.
      whole: whether a round is whole, or its local steps alone.
    """

    def __init__(self, round_fn: RoundFn, workload: Workload, params: Tree, whole: bool = True):
        self._round_fn, self._workload, self._whole = round_fn, workload, whole
        self._rounds = 0
        self._state = round_fn.init(params, jax.random.key(0))

    def run_round(self) -> float:
        """Run the next round and return its seconds."""
        indices = make_indices(self._workload, self._rounds)
        batches = indices.reshape(len(indices), *self._round_fn.layout.shape, -1)
        self._rounds += 1
        start = time.perf_counter()
        self._state, _ = self._round_fn.local_steps(self._state, batches)
        if self._whole:
            self._state, _ = self._round_fn.end_round(self._state)
        jax.block_until_ready(self._state)
        return time.perf_counter() - start

    def collectives(self) -> list[tuple[str, int, int, int]]:
        """The collectives of a round: kind, bytes, devices that take part, number of times."""
        if not self._whole:
            return []
        devices = self._round_fn.mesh.shape
        return [
            (one.kind, one.nbytes, math.prod(devices[axis] for axis in one.axes), one.times)
            for one in self._round_fn.collectives(self._state, self._workload.steps)
        ]


def make_trainings(workload: Workload) -> Callable[[str, int], Training]:
    """Make the function from a method and a number of workers to its training.

    A training is built when it is first requested.
    """
    params, pool = initial_params(workload), make_pool(workload)
    methods = measured_methods(gradient_of(workload), optax.sgd(LEARNING_RATE), workload.steps)

    @functools.cache
    def make_round_fn(method: str, workers: int) -> RoundFn:
        layout = Layout(workers_per_hub=workers)
        mesh = make_mesh(layout, shape=(1, len(jax.devices())))
        return RoundFn(methods[method], layout, mesh, pool)

    @functools.cache
    def training(method: str, workers: int) -> Training:
        sized, whole = workload._replace(workers=workers), method != LOCAL_STEPS
        round_fn = make_round_fn(method if whole else "local_sgd", workers)
        return Training(round_fn, sized, params, whole)

    return training


def train() -> int:
    """Join the other processes and run requested rounds until the standard input ends."""
    workload = parse_workload(FLAGS.workload)
    reply = open_replies()
    _start_devices()
    reply(devices=len(jax.devices()))
    training_of = make_trainings(workload)
    for line in sys.stdin:
        training = training_of(*json.loads(line))
        reply(seconds=training.run_round(), collectives=training.collectives())
    return 0


def _start_devices() -> None:
    """Start this process's virtual devices, and join those of the other processes."""
    be_patient()
    keep_programs()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    if FLAGS.processes > 1:
        jax.distributed.initialize(
            *(FLAGS.coordinator, FLAGS.processes, FLAGS.process),
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=3600,  # the benchmark itself ends processes that hang
        )


def main() -> None:
    flags.DEFINE_string("workload", "mlp", "Name of a workload, or its fields in JSON.")
    flags.DEFINE_integer("devices", 1, "Number of virtual devices of this process.")
    flags.DEFINE_integer("processes", 1, "Number of processes that train together.")
    flags.DEFINE_integer("process", 0, "Number of this process, from 0.")
    flags.DEFINE_string("coordinator", None, "Address of process 0, HOST:PORT.")
    run_command(train, __doc__)


if __name__ == "__main__":
    main()
