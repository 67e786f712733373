"""PyTorch in several processes with one thread each, which share the model in memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.benchmarks.peers.worker_processes import start
from experiments.benchmarks.speed.jax_contenders import Rounds
from experiments.benchmarks.speed.torch_contender import (
    build_module,
    make_end,
    make_train,
    torch_rounds,
)
from experiments.benchmarks.speed.torch_models import named_params
from experiments.benchmarks.workloads import Workload
from experiments.launching.starting import cores
from jaxlocal.types import Tree

compiled_rounds = partial(torch_rounds, compiled=True)


def parallel_rounds(workload: Workload, params: Tree, compiled: bool = False) -> Rounds:
    """Run rounds in one process for each core, with an equal part of the workers each."""
    module = build_module(workload, params)
    common, parts = _shared(module), np.array_split(np.arange(workload.workers), cores())
    sums = [_shared(module) for _ in parts]
    torch.set_num_threads(1)
    given = [
        (workload, params, len(part), compiled, common, total)
        for part, total in zip(parts, sums, strict=True)
    ]
    own, others = _make_part(*given[0]), [start(_make_part, *one) for one in given[1:]]
    end = make_end(workload, common)

    def run(indices: np.ndarray) -> Any:
        for process, part in zip(others, parts[1:], strict=True):
            process.send(indices[:, part])
        losses = [own(torch.from_numpy(indices[:, parts[0]])).numpy()]
        losses += [process.recv() for process in others]
        for total in sums[1:]:
            torch._foreach_add_(sums[0], total)
        end(sums[0])
        return np.concatenate(losses).T

    return Rounds(run, lambda: named_params(workload, module, common, params))


parallel_compiled_rounds = partial(parallel_rounds, compiled=True)


def _shared(module: torch.nn.Module) -> list[Tensor]:
    """Copies of the parameters that processes share."""
    return [x.detach().clone().share_memory_() for x in module.parameters()]


def _make_part(
    workload: Workload,
    params: Tree,
    workers: int,
    compiled: bool,
    common: list[Tensor],
    sums: list[Tensor],
) -> Callable[[Tensor], Tensor]:
    """Make the function that trains a part of the workers, and puts the sum of their models."""
    train = make_train(build_module(workload, params), workload, workers, compiled)

    def train_part(indices: Tensor) -> Tensor:
        total, losses = train(common, indices)
        torch._foreach_copy_(sums, total)
        return losses

    return train_part
