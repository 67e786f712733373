"""PyTorch in several processes with one thread each, which share the model in memory."""

import multiprocessing
import os
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.multiprocessing  # registers how processes share tensors
from torch import Tensor

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
    common = [x.detach().clone().share_memory_() for x in module.parameters()]
    parts = np.array_split(np.arange(workload.workers), cores())
    others = [_start(workload, params, len(part), compiled, common) for part in parts[1:]]
    torch.set_num_threads(1)
    train = make_train(module, workload, len(parts[0]), compiled)
    end = make_end(workload, common)

    def run(indices: np.ndarray) -> Any:
        for (connection, _), part in zip(others, parts[1:], strict=True):
            connection.send(indices[:, part])
        total, losses = train(common, torch.from_numpy(indices[:, parts[0]]))
        gathered = [losses.numpy()]
        for connection, sums in others:
            gathered.append(connection.recv())
            torch._foreach_add_(total, sums)
        end(total)
        return np.concatenate(gathered).T

    return Rounds(run, lambda: named_params(workload, module, common, params))


parallel_compiled_rounds = partial(parallel_rounds, compiled=True)


def _start(
    workload: Workload, params: Tree, workers: int, compiled: bool, common: Sequence[Tensor]
) -> tuple[Connection, list[Tensor]]:
    """Start a process for some workers; returns its connection, and the sum of their models."""
    sums = [torch.zeros_like(x).share_memory_() for x in common]
    ours, theirs = multiprocessing.Pipe()
    arguments = (theirs, workload, params, workers, compiled, common, sums)
    spawn = multiprocessing.get_context("spawn")
    spawn.Process(target=_serve, args=arguments, daemon=True).start()
    theirs.close()  # so that the process ends with this one
    return ours, sums


def _serve(
    connection: Connection,
    workload: Workload,
    params: Tree,
    workers: int,
    compiled: bool,
    common: list[Tensor],
    sums: list[Tensor],
) -> None:
    """Train workers on the indices that arrive, and reply with their losses."""
    torch.set_num_threads(1)
    train = make_train(build_module(workload, params), workload, workers, compiled)
    while True:
        try:
            indices = connection.recv()
        except EOFError:
            os._exit(0)
        total, losses = train(common, torch.from_numpy(indices))
        torch._foreach_copy_(sums, total)
        connection.send(losses.numpy())
