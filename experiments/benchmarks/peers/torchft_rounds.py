"""Rounds of torchft's DiLoCo: a process for each worker, and averages of the processes by Gloo."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from experiments.benchmarks.peers.worker_processes import start
from experiments.benchmarks.speed.jax_contenders import Rounds
from experiments.benchmarks.speed.torch_contender import build_module, loss, make_batches, scaled
from experiments.benchmarks.speed.torch_models import named_params
from experiments.benchmarks.workloads import ADAMW_RATE, Workload
from jaxlocal.types import Tree

HOST, PATIENCE = "localhost", timedelta(minutes=5)
KEPT: list[Any] = []  # servers, which end where nothing refers to them


def torchft_rounds(workload: Workload, params: Tree) -> Rounds:
    """Run rounds of torchft's DiLoCo, with one thread in each of the processes."""
    lighthouse = LighthouseServer(bind=f"{HOST}:0", min_replicas=workload.workers)
    KEPT.append(lighthouse)
    address, module = lighthouse.address(), build_module(workload, params)
    torch.set_num_threads(1)
    others = [
        start(_make_other, workload, params, number, address)
        for number in range(1, workload.workers)
    ]
    own = _make_replica(module, workload, 0, address)

    def run(indices: np.ndarray) -> Any:
        for number, process in enumerate(others, 1):
            process.send(indices[:, number])
        losses = [own(torch.from_numpy(indices[:, 0])).numpy()]
        losses += [process.recv() for process in others]
        return np.stack(losses, 1)

    values = list(module.parameters())
    return Rounds(run, lambda: named_params(workload, module, values, params))


def _make_other(
    workload: Workload, params: Tree, number: int, address: str
) -> Callable[[Tensor], Tensor]:
    return _make_replica(build_module(workload, params), workload, number, address)


def _make_replica(
    module: nn.Module, workload: Workload, number: int, address: str
) -> Callable[[Tensor], Tensor]:
    """Make the function that trains one worker for a round; it ends in the average of all."""
    inner = torch.optim.AdamW(module.parameters(), ADAMW_RATE, weight_decay=1e-4, fused=True)
    outer = torch.optim.SGD(module.parameters(), 0.7, momentum=0.9, nesterov=True)
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    KEPT.append(store)
    manager = Manager(
        ProcessGroupGloo(timeout=PATIENCE),
        load_state_dict=module.load_state_dict,
        state_dict=module.state_dict,
        min_replica_size=workload.workers,
        use_async_quorum=False,
        timeout=PATIENCE,
        quorum_timeout=PATIENCE,
        rank=0,
        world_size=1,
        store_addr=HOST,
        store_port=store.port,
        lighthouse_addr=address,
        replica_id=f"worker_{number}",
        hostname=HOST,
        init_sync=False,  # all start from the same parameters
    )
    diloco = DiLoCo(
        manager, [module], inner, outer, sync_every=workload.steps, use_bucketization=True
    )
    diloco.__enter__()  # averages from now on at every sync_every-th step of the inner optimizer
    batch = make_batches(workload)

    def train(indices: Tensor) -> Tensor:
        losses = []
        for index in indices:
            inputs, targets = batch(index)
            value = loss(module(scaled(inputs)), targets)
            inner.zero_grad()
            value.backward()
            losses.append(value.detach())
            inner.step()
        return torch.stack(losses)

    return train
