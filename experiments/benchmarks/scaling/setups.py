"""The devices and processes that the suite measures, and the rounds that it requests of them."""

from typing import NamedTuple

from experiments.benchmarks.workloads import Workload

LOCAL_STEPS = "local_steps"  # the steps of local_sgd without the end of its rounds
DATA_PARALLEL = "data_parallel"
METHODS = (LOCAL_STEPS, "local_sgd", "cser", "qsparse_local_sgd", DATA_PARALLEL)
WORKERS, STEPS = 8, 16  # in all; in one round
EXAMPLES = 2048  # in the pool, of which every device holds a copy


class Setup(NamedTuple):
    """A number of processes, each with a number of virtual devices."""

    devices: int = 1
    processes: int = 1

    @property
    def total(self) -> int:
        """Devices of all processes."""
        return self.devices * self.processes

    @property
    def title(self) -> str:
        """
        >>> Setup(8).title, Setup(processes=2).title
        ('8 devices', '2 processes')
        """
        if self.processes > 1:
            return f"{self.processes} processes"
        return f"{self.devices} device{'s' * (self.devices > 1)}"


class Request(NamedTuple):
    """A round of a method."""

    method: str
    workers: int  # in all
    slow: bool = False  # whether over the slow link


ALONE = Setup()
SETUPS = (*(Setup(devices=n) for n in (1, 2, 4, 8)), *(Setup(processes=n) for n in (2, 4)))
OVER_LINK = (Setup(processes=2), Setup(processes=4))


def sized(workload: Workload) -> Workload:
    """Resize a workload so that its workers divide over all setups and each device can hold all
    examples."""
    return workload._replace(workers=WORKERS, steps=STEPS, examples=EXAMPLES)
