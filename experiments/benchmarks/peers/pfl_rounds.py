"""Rounds of pfl-research's federated averaging, simulated in one process on PyTorch."""

import itertools

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.common_types import Population
from pfl.context import CentralContext
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from experiments.benchmarks.speed.jax_contenders import Rounds
from experiments.benchmarks.speed.torch_contender import build_module, loss, make_batches, scaled
from experiments.benchmarks.speed.torch_models import named_params
from experiments.benchmarks.workloads import LEARNING_RATE, Workload
from jaxlocal.types import Tree


def pfl_rounds(workload: Workload, params: Tree) -> Rounds:
    """Run rounds of pfl-research: a user is a worker with as many examples as a round takes."""
    module, take = build_module(workload, params), make_batches(workload)
    trained = _WithLoss(module)
    central = torch.optim.SGD(trained.parameters(), lr=1.0)
    model, algorithm = PyTorchModel(trained, torch.optim.SGD, central), FederatedAveraging()
    settings = CentralContext(
        current_central_iteration=0,
        do_evaluation=False,
        cohort_size=workload.workers,
        population=Population.TRAIN,
        algorithm_params=NNAlgorithmParams(1, 1, workload.workers, None),
        model_train_params=NNTrainHyperParams(
            local_batch_size=workload.batch_size,
            local_num_epochs=1,
            local_learning_rate=LEARNING_RATE,
        ),
    )

    def run(indices: np.ndarray) -> None:
        mine = torch.from_numpy(indices).transpose(0, 1).flatten(1)
        in_turn = itertools.count()
        users = FederatedDataset(lambda worker: Dataset(take(mine[worker])), lambda: next(in_turn))
        backend = SimulatedBackend(training_data=users, val_data=users)
        statistics, metrics = backend.gather_results(model, algorithm, central_context=settings)
        algorithm.process_aggregated_statistics(settings, metrics, model, statistics)

    values = list(module.parameters())
    return Rounds(run, lambda: named_params(workload, module, values, params))


class _WithLoss(nn.Module):
    """A module with the methods that pfl-research calls."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return loss(self.module(scaled(inputs)), targets)

    def metrics(self) -> dict:
        return {}
