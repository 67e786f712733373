"""Rounds of Flower's federated averaging, simulated by Ray: PyTorch in a process for each core."""

import os
import threading
from functools import cache
from queue import Queue
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["PYTHONPATH"] = os.getcwd()  # where the processes of Ray find this module

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from experiments.benchmarks.speed.jax_contenders import Rounds
from experiments.benchmarks.speed.torch_contender import build_module, make_batches, make_step
from experiments.benchmarks.speed.torch_models import named_params
from experiments.benchmarks.workloads import Workload, initial_params
from experiments.launching.starting import cores
from jaxlocal.types import Tree


def flower_rounds(workload: Workload, params: Tree) -> Rounds:
    """Run rounds of Flower: the simulation runs in a thread, and its server waits for requests."""
    module = build_module(workload, params)
    requests: Queue[np.ndarray] = Queue()
    replies: Queue[tuple[ArrayRecord, float]] = Queue()
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        while len(nodes := sorted(grid.get_node_ids())) < workload.workers:
            pass
        arrays, strategy, number = ArrayRecord(module.state_dict()), FedAvg(), 0
        while True:
            messages = _messages(arrays, requests.get(), nodes)
            answers = list(grid.send_and_receive(messages))
            arrays, metrics = strategy.aggregate_train(number, answers)
            number += 1
            replies.put((arrays, float(metrics["loss"])))

    settings = {
        "init_args": {"num_cpus": cores(), "include_dashboard": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    arguments = (server, _client_app(workload), workload.workers, "ray", settings)
    threading.Thread(target=run_simulation, args=arguments, daemon=True).start()

    def run(indices: np.ndarray) -> Any:
        requests.put(indices)
        arrays, loss = replies.get()
        module.load_state_dict(arrays.to_torch_state_dict())
        return loss

    values = list(module.parameters())
    return Rounds(run, lambda: named_params(workload, module, values, params))


def _messages(arrays: ArrayRecord, indices: np.ndarray, nodes: list[int]) -> list[Message]:
    """The message to each node: the common model, and the indices of its examples."""
    return [
        Message(
            RecordDict({"arrays": arrays, "indices": ArrayRecord([indices[:, worker]])}),
            dst_node_id=node,
            message_type=MessageType.TRAIN,
        )
        for worker, node in enumerate(nodes)
    ]


def _client_app(workload: Workload) -> ClientApp:
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        module, step, batch = _trainer(workload)
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        (indices,) = message.content["indices"].to_numpy_ndarrays()
        losses = [step((), *batch(index)).item() for index in torch.tensor(indices)]
        metrics = MetricRecord({"loss": float(np.mean(losses)), "num-examples": indices.size})
        content = RecordDict({"arrays": ArrayRecord(module.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return client


@cache
def _trainer(workload: Workload) -> tuple[Any, Any, Any]:
    """The model, the step and the batches of a process, which its clients share in turn."""
    torch.set_num_threads(1)
    module = build_module(workload, initial_params(workload))
    return module, make_step(module, workload, compiled=False), make_batches(workload)
