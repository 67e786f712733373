"""A program as a user starts it: to the end of its first round of a workload, or all of `train`.

    python -m experiments.benchmarks.start.program mll_cnn SECONDS

where SECONDS is `time.monotonic()` of the process that starts it. It writes one line of JSON, with
the seconds of each phase. What is imported before the first phase is imported by every program.
"""

import gc
import importlib
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from experiments.benchmarks.child_process import open_replies

TRAIN = "train"  # `python -m experiments.train` without flags, to its end
IMPORTS, INIT, RUN = "imports", "init", "run"
COMPILATION = {
    "trace": "/jax/core/compile/jaxpr_trace_duration",
    "lower": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compile": "/jax/core/compile/backend_compile_duration",
}
PHASES = (IMPORTS, INIT, *COMPILATION, RUN)


class Clock:
    """Seconds of the phases of this process, one after another.

    Args:
      began: when the process was started, by `time.monotonic`.
    """

    def __init__(self, began: float):
        self._last, self.seconds = began, dict.fromkeys(PHASES, 0.0)
        self._spans: dict[str, list[tuple[float, float]]] = {}
        self.programs = 0

    def end(self, phase: str) -> None:
        """End a phase; what JAX traces, lowers and compiles since `watch` counts apart from it."""
        now = time.monotonic()
        self.seconds[phase] += now - self._last
        for name, spans in self._spans.items():
            self.seconds[name] = covered(spans)
            self.seconds[phase] -= self.seconds[name]
        self._last, self._spans = now, {}

    def watch(self) -> None:
        """Count from now on what JAX traces, lowers and compiles."""
        import jax

        names = {event: name for name, event in COMPILATION.items()}

        def listen(event: str, duration_secs: float, **_: Any) -> None:
            if name := names.get(event):
                now = time.monotonic()
                self._spans.setdefault(name, []).append((now - duration_secs, now))
                self.programs += name == "compile"

        jax.monitoring.register_event_duration_secs_listener(listen)


def covered(spans: list[tuple[float, float]]) -> float:
    """Seconds in which at least one of some spans of time is under way: a trace has others inside.

    >>> covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
    4.0
    """
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def first_round(name: str, clock: Clock) -> None:
    """Run a round of Local SGD of a workload, as a program of the README does."""
    gc.enable()  # which the commands of `experiments` do after their imports
    import jax
    import optax

    import jaxlocal
    from experiments.benchmarks.workloads import (
        LEARNING_RATE,
        make_indices,
        make_pool,
        model_of,
        parse_workload,
        scaled,
    )
    from experiments.launching.starting import cores, use_the_cores
    from jaxlocal.models.supervised import training_loss

    clock.end(IMPORTS)
    workload = parse_workload(name)._replace(examples=1000)
    grid = (1, workload.workers)
    use_the_cores([grid], cores())
    sgd = optax.sgd(LEARNING_RATE)
    model = model_of(workload)
    loss = training_loss(model, scaled, workload.classes)
    grad_fn = jaxlocal.gradients(loss, stateful=True)
    method = jaxlocal.local_sgd(grad_fn, sgd, period=workload.steps)
    layout = jaxlocal.Layout(*grid)
    round_fn = jaxlocal.RoundFn(method, layout, data=make_pool(workload))
    params, model_state = model.init(jax.random.key(0))
    state = round_fn.init(params, jax.random.key(1), model_state)
    indices = make_indices(workload, 0).reshape(workload.steps, *grid, workload.batch_size)
    jax.block_until_ready(state)
    clock.end(INIT)
    clock.watch()
    jax.block_until_ready(round_fn(state, indices))
    clock.end(RUN)


def train(clock: Clock) -> None:
    """Run `python -m experiments.train` without flags, in a folder of its own."""
    command = importlib.import_module(f"experiments.{TRAIN}")  # a command, above the benchmarks
    clock.end(IMPORTS)
    clock.watch()
    with tempfile.TemporaryDirectory() as folder:
        line = [str(command.__file__), f"--workdir={os.path.join(folder, 'run')}"]
        with mock.patch.object(sys, "argv", line):
            _succeed(lambda: runpy.run_path(line[0], run_name="__main__"))
    clock.end(RUN)


def _succeed(run: Callable[[], Any]) -> None:
    """Run a command in this process; only a failure ends the process."""
    try:
        run()
    except SystemExit as ended:
        if ended.code:
            raise


def main() -> None:
    name, began = sys.argv[1:]
    clock, reply = Clock(float(began)), open_replies()
    if name == TRAIN:
        train(clock)
    else:
        first_round(name, clock)
    reply(seconds=clock.seconds, programs=clock.programs)


if __name__ == "__main__":
    main()
