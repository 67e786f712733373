"""The contender that runs on PyTorch: one worker after another in eager mode, with parameters that
are updated in place."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from experiments.benchmarks.speed.jax_contenders import Rounds
from experiments.benchmarks.speed.torch_models import torch_model
from experiments.benchmarks.workloads import LEARNING_RATE, Workload, make_pool
from jaxlocal.types import Tree


def torch_rounds(workload: Workload, params: Tree) -> Rounds:
    """Run rounds of Local SGD in PyTorch: a model per worker, forward, backward and SGD in turn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pool = [torch.from_numpy(x).to(device) for x in _stored(workload)]
    models = [torch_model(workload, params).to(device) for _ in range(workload.workers)]
    parameters: list[list[Tensor]] = [list(model.parameters()) for model in models]

    def update(worker: int, index: Tensor) -> Tensor:
        inputs, targets = (x.index_select(0, index) for x in pool)
        value = loss(models[worker](_scaled(inputs)), targets)
        grads = torch.autograd.grad(value, parameters[worker])
        with torch.no_grad():
            torch._foreach_add_(parameters[worker], grads, alpha=-LEARNING_RATE)
        return value.detach()

    def run(indices: np.ndarray) -> Any:
        steps = torch.from_numpy(indices).to(device)
        losses = [update(worker, index) for step in steps for worker, index in enumerate(step)]
        _average(parameters)
        return torch.stack(losses).reshape(indices.shape[:2]).cpu().numpy()

    return Rounds(run)


@torch.no_grad()
def _average(parameters: list[list[Tensor]]) -> None:
    """Replace the parameters of every worker by their mean."""
    total = [x.clone() for x in parameters[0]]
    for one_worker in parameters[1:]:
        torch._foreach_add_(total, one_worker)
    torch._foreach_div_(total, len(parameters))
    for one_worker in parameters:
        torch._foreach_copy_(one_worker, total)


def _stored(workload: Workload) -> list[np.ndarray]:
    """Inputs and targets in PyTorch's layout: channels first, classes as long integers, and the
    targets of a single output as floats."""
    pool = make_pool(workload)
    inputs, targets = pool["inputs"], pool["targets"]
    if inputs.ndim == 4:
        inputs = np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))
    return [inputs, targets.astype(np.float32 if workload.outputs == 1 else np.int64)]


def _scaled(inputs: Tensor) -> Tensor:
    return inputs.to(torch.float32).mul_(1 / 255) if inputs.dtype == torch.uint8 else inputs


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of logits [..., outputs], binary for a single output."""
    if logits.shape[-1] == 1:
        return functional.binary_cross_entropy_with_logits(logits[:, 0], targets)
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
