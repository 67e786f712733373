"""Processes that train a part of the workers of a PyTorch contender, on request."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing  # registers how processes share tensors

# Makes what trains on indices and returns losses.
MakeTrain = Callable[..., Callable[[torch.Tensor], torch.Tensor]]


def start(make_train: MakeTrain, *arguments: Any) -> Connection:
    """Start a process of one thread that trains; send it indices, and it sends losses.

    Args:
      make_train: a function of a module, which the process calls.
      *arguments: of it. Tensors in shared memory stay shared.
    """
    ours, theirs = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    spawn.Process(target=_serve, args=(theirs, make_train, arguments), daemon=True).start()
    theirs.close()  # so that the process ends with this one
    return ours


def _serve(connection: Connection, make_train: MakeTrain, arguments: tuple) -> None:
    torch.set_num_threads(1)
    train = make_train(*arguments)
    while True:
        try:
            indices = connection.recv()
        except EOFError:
            os._exit(0)
        connection.send(train(torch.from_numpy(indices)).numpy())
