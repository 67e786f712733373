"""Run the suite `compression`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console

from experiments.benchmarks.compression.method_memory import method_memory
from experiments.benchmarks.compression.sync_time import sync_times
from experiments.benchmarks.compression.tables import show_memory, show_sync_times
from experiments.benchmarks.compression.task import make_task
from experiments.benchmarks.machine_load import OtherLoad, wait_until_idle
from jaxlocal.compression import parse

COMPRESSORS = (
    *("identity", "grbs:64", "random_k:64", "top_k:64", "top_k:64:tensor", "top_k:64:model"),
    *("top_k:64+int8", "sign", "qsgd:4", "int8", "bfloat16", "powersgd:4"),
)


class Options(NamedTuple):
    """What the suite measures."""

    model: str  # whose gradient and synchronisations are timed
    memory_model: str  # whose memory is counted
    image: int  # height and width of the images, in pixels
    batch_size: int  # examples of one worker in one step
    workers: int  # of the methods whose memory is counted
    compressors: Sequence[str]  # spec strings
    repeats: int


def run(options: Options, wait_idle: float, console: Console) -> dict[str, Any]:
    """Measure the time and the memory of compressed messages, and print the tables.

    Args:
      options: what is measured.
      wait_idle: seconds to wait for an idle machine.
      console: where tables are printed.

    Returns:
      The figures: "sync_times", "memory", "other_load_before" and "other_load_during".
    """
    for spec in options.compressors:
        parse(spec)  # a mistake is reported before anything is measured
    image = (options.image, options.image, 3)
    timed = make_task(options.model, image, options.batch_size)
    counted = make_task(options.memory_model, image, options.batch_size)
    before, load = wait_until_idle(wait_idle), OtherLoad()
    figures = {
        "sync_times": sync_times(timed, options.compressors, options.repeats),
        "memory": method_memory(counted, options.workers),
    }
    show_sync_times(figures["sync_times"], options.model, options.batch_size, console)
    show_memory(figures["memory"], options.memory_model, console)
    return {**figures, "other_load_before": before, "other_load_during": [load.share()]}
