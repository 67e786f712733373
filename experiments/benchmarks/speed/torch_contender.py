"""The contender that runs on PyTorch: one worker after another, each through all steps of a round,
on one model whose parameters are updated in place."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.adamw import adamw

from experiments.benchmarks.speed.jax_contenders import Rounds
from experiments.benchmarks.speed.torch_models import named_params, torch_model
from experiments.benchmarks.workloads import ADAMW_RATE, LEARNING_RATE, Workload, make_pool
from jaxlocal.types import Tree

# Trains workers from a common model on indices [steps, workers, batch]; returns the sum of their
# models and their losses [workers, steps].
Train = Callable[[list[Tensor], Tensor], tuple[list[Tensor], Tensor]]
Step = Callable[..., Tensor]  # step(state, inputs, targets): updates parameters and optimizer state
ADAMW = {"beta1": 0.9, "beta2": 0.999, "lr": ADAMW_RATE, "weight_decay": 1e-4, "eps": 1e-8}


def torch_rounds(workload: Workload, params: Tree, compiled: bool = False) -> Rounds:
    """Run rounds in PyTorch: forward, backward and update of one worker after another.

    Args:
      workload: what is trained.
      params: that all workers start from.
      compiled: whether a step is compiled by `torch.compile`.
    """
    module = build_module(workload, params)
    train = make_train(module, workload, workload.workers, compiled)
    common = [x.detach().clone() for x in module.parameters()]
    end = make_end(workload, common)

    def run(indices: np.ndarray) -> Any:
        total, losses = train(common, torch.from_numpy(indices).to(_device()))
        end(total)
        return losses.T.cpu().numpy()

    return Rounds(run, lambda: named_params(workload, module, common, params))


def build_module(workload: Workload, params: Tree) -> nn.Module:
    """Build the model on the device, in the memory format that is fastest there."""
    module = torch_model(workload, params).to(_device())
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_batches(workload: Workload) -> Callable[[Tensor], list[Tensor]]:
    """Make the function that takes inputs and targets of some indices from the pool."""
    pool = [torch.from_numpy(x).to(_device()) for x in _stored(workload)]
    pool[0] = pool[0].movedim(-1, 1) if pool[0].ndim == 4 else pool[0]  # channels stay last
    return lambda index: [x.index_select(0, index) for x in pool]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_train(module: nn.Module, workload: Workload, workers: int, compiled: bool) -> Train:
    """Make the function that trains workers for a round, with optimizer states of their own."""
    parameters, batch = list(module.parameters()), make_batches(workload)
    step = make_step(module, workload, compiled)
    states = [_adamw_state(parameters) for _ in range(workers) if workload.method == "diloco"]

    def train(common: list[Tensor], indices: Tensor) -> tuple[list[Tensor], Tensor]:
        total, losses = [torch.zeros_like(x) for x in common], []
        for worker in range(workers):
            _assign(parameters, common)
            for index in indices[:, worker]:
                losses.append(step(states[worker] if states else (), *batch(index)))
            _add(total, parameters)
        return total, torch.stack(losses).view(workers, -1)

    return train


def make_step(module: nn.Module, workload: Workload, compiled: bool) -> Step:
    """Make the function that takes a step of the module's parameters on a batch."""
    parameters = list(module.parameters())
    names = [name for name, _ in module.named_parameters()]

    def eager(inputs: Tensor, targets: Tensor) -> tuple[Any, Tensor]:
        value = loss(module(scaled(inputs)), targets)
        return torch.autograd.grad(value, parameters), value.detach()

    def functional_loss(params: list[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        named = dict(zip(names, params, strict=True))
        return loss(torch.func.functional_call(module, named, (scaled(inputs),)), targets)

    def step(state: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        grads, value = gradient(inputs, targets)
        with torch.no_grad():
            _update(params, grads, state, workload, fused=not compiled)
        return value

    if not compiled:
        params, gradient = parameters, eager
        return step
    # All of the step is one program, which is faster than to compile the loss alone.
    params = [x.detach() for x in parameters]
    gradient = lambda *batch: torch.func.grad_and_value(functional_loss)(params, *batch)
    return torch.compile(step)


def _update(params: list[Tensor], grads: Any, state: Any, workload: Workload, fused: bool) -> None:
    if workload.method == "local_sgd":
        torch._foreach_add_(params, list(grads), alpha=-LEARNING_RATE)
        return
    kind: Any = {"fused": fused, "foreach": False, "amsgrad": False, "maximize": False}
    first, second, steps = state
    adamw(params, list(grads), first, second, [], steps, **kind, **ADAMW)


def _adamw_state(parameters: list[nn.Parameter]) -> tuple[list[Tensor], ...]:
    """First and second moments and step counts, of one worker."""
    zeros = lambda: [torch.zeros_like(x, requires_grad=False) for x in parameters]
    return zeros(), zeros(), [torch.zeros((), device=x.device) for x in parameters]


def make_end(workload: Workload, common: list[Tensor]) -> Callable[[list[Tensor]], None]:
    """Make the function that ends a round: it updates the common model by the sum of all models."""
    outer = torch.optim.SGD(common, 0.7, momentum=0.9, nesterov=True)

    @torch.no_grad()
    def end(total: list[Tensor]) -> None:
        torch._foreach_div_(total, workload.workers)
        if workload.method == "local_sgd":
            torch._foreach_copy_(common, total)
            return
        for x, average in zip(common, total, strict=True):
            x.grad = x - average
        outer.step()

    return end


@torch.no_grad()
def _assign(parameters: Any, values: list[Tensor]) -> None:
    torch._foreach_copy_(parameters, values)


@torch.no_grad()
def _add(total: list[Tensor], parameters: Any) -> None:
    torch._foreach_add_(total, parameters)


def _stored(workload: Workload) -> list[np.ndarray]:
    """Inputs and targets in PyTorch's types: classes as long integers, and the targets of a single
    output as floats."""
    pool = make_pool(workload)
    inputs, targets = pool["inputs"], pool["targets"]
    return [inputs, targets.astype(np.float32 if workload.outputs == 1 else np.int64)]


def scaled(inputs: Tensor) -> Tensor:
    """Scale uint8 images to [0, 1]; tokens remain as they are."""
    return inputs.to(torch.float32).mul_(1 / 255) if inputs.dtype == torch.uint8 else inputs


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of logits [..., outputs], binary for a single output."""
    if logits.shape[-1] == 1:
        return functional.binary_cross_entropy_with_logits(logits[:, 0], targets)
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
