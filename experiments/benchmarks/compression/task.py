"""The training task of the suite: a model of the library on random images."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

import jaxlocal
from jaxlocal.models import build
from jaxlocal.models.supervised import training_loss
from jaxlocal.types import Tree

CLASSES = 10


class Task(NamedTuple):
    """A model, its gradient function, and the shapes of its state and of a batch."""

    params: Tree  # shapes
    model_state: Tree  # shapes
    init: Callable
    grad_fn: Callable
    batch: dict[str, jax.ShapeDtypeStruct]  # of one worker


def make_task(model: str, image: tuple[int, ...], batch_size: int) -> Task:
    """Build a model of the library as a task.

    Args:
      model: a name in `jaxlocal.models`.
      image: height, width and channels.
      batch_size: examples of one worker in one step.

    Raises:
      ConfigurationError: no model has that name.
    """
    built = build(model, image, CLASSES)
    grad_fn = jaxlocal.gradients(training_loss(built, lambda x: x, CLASSES), stateful=True)
    batch = {
        "inputs": jax.ShapeDtypeStruct((batch_size, *image), np.float32),
        "targets": jax.ShapeDtypeStruct((batch_size,), np.int32),
    }
    params, model_state = jax.eval_shape(built.init, jax.random.key(0))
    return Task(params, model_state, built.init, grad_fn, batch)
