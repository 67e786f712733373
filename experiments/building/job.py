"""From a config to what it describes: a plan of a run, and with data and a model a job that can be
trained."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from experiments.building.checks import check_numbers, mesh_shape
from experiments.building.compressors import make_compressors
from experiments.building.config import Config
from experiments.building.data import check_data
from experiments.building.epochs import in_steps, steps_of_epoch
from experiments.building.methods import Parts, build_method
from experiments.building.models import build_model, make_gradients, make_metrics
from experiments.building.optimizers import make_optimizer
from experiments.building.running_averages import make_running_averages
from experiments.building.same_data import check_same_data
from experiments.building.schedules import count_steps, make_period, make_schedule
from experiments.building.workers import make_layout, mixing_matrix, worker_grid
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh, periods
from jaxlocal.communication import topology
from jaxlocal.data import Augmentation, Dataset, load, parse_augmentation, plan_batches
from jaxlocal.methods import METHODS
from jaxlocal.models import Model
from jaxlocal.models.initialization import compiled_init
from jaxlocal.stages.gradient import GradFn
from jaxlocal.training import RunningAverage, with_running_averages
from jaxlocal.training.dispatching import schedule
from jaxlocal.types import Compressor, Method, TrainState, Tree

MEASUREMENTS, CHECKPOINTS = 25, 10  # of a run, about, by default
CHUNK_STEPS, CHUNK_BYTES = 256, 64 << 20  # the most steps, and bytes of batches, in one dispatch
INDEX_BYTES = 4
LARGEST_TENSOR = 1 << 30

_load = functools.lru_cache(maxsize=8)(load)  # the runs of one process share what is read


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config describes without data: workers, devices, method, length and state."""

    config: Config
    in_steps: Config  # with steps in place of epochs
    layout: Layout
    mesh: Mesh
    method: Method
    steps: int
    lengths: tuple[int, ...]  # H of every round
    learning_rate: Callable[[int], float]  # η by step, in float64
    zeta: float | None  # of the hub network, where there is one
    compressors: dict[str, Compressor]  # by what they compress: "gradient", "reset" or "sync"
    running_averages: dict[str, RunningAverage]  # of the model, by name: "ema" or "swa"
    model_shapes: tuple[Tree, Tree]  # of one model's parameters and state
    state: TrainState  # shapes and shardings of the training state
    example_bytes: int  # moved to the devices for each example of a batch
    pool_bytes: int  # of all examples, where every device holds them


@dataclasses.dataclass(frozen=True)
class Job(Plan):
    """A plan with data and a model: a run that can be trained."""

    dataset: Dataset
    model: Model
    metrics: Callable[[Tree, Tree, Tree], dict[str, jax.Array]]
    augmentation: Augmentation | None  # of the training images


class _Task(NamedTuple):
    """What the dataset and the model contribute to a plan."""

    grad_fn: GradFn
    model_shapes: tuple[Tree, Tree]
    shard_sizes: NDArray | None = None  # [hubs, workers per hub]
    example_bytes: int = INDEX_BYTES
    pool_bytes: int = 0
    epoch: int | None = None  # its steps


def build_plan(config: Config) -> Plan:
    """Build what a config describes: a `Job`, or with `--parameters` a `Plan` without a model.

    Raises:
      ConfigurationError: flags that do not fit each other, the dataset, the model or the devices.
    """
    if config.parameters is None:
        return build_job(config)
    check_numbers(config)
    task = _Task(lambda *_: ({}, {}, {}), (_tensors(config.parameters), {}))
    return _plan(config, worker_grid(config), task)


def _tensors(parameters: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a model that is not built, in tensors whose elements an int32 counts."""
    whole, rest = divmod(parameters, LARGEST_TENSOR)
    sizes = [LARGEST_TENSOR] * whole + [rest] * (rest > 0)
    return {f"part_{n}": jax.ShapeDtypeStruct((size,), np.float32) for n, size in enumerate(sizes)}


def build_job(config: Config) -> Job:
    """Build the run of a config, ready to be trained.

    Raises:
      ConfigurationError: flags that do not fit each other, the dataset, the model or the devices.
    """
    check_numbers(config)
    if config.parameters is not None:
        raise without_model(config, "training needs one")
    grid, augmentation = worker_grid(config), parse_augmentation(config.augment)
    dataset = _load(config.dataset, _data_folder(config), config.seed, config.image_size)
    check_data(config, dataset, augmentation)
    check_same_data(dataset)
    model = build_model(config, dataset)
    model = model._replace(init=compiled_init(model.init))  # with what the dataset changes
    shapes, example = jax.eval_shape(model.init, jax.random.key(0)), dataset.train_source()[0]
    sizes = (dataset.train_examples, *grid, config.batch_size)
    task = _Task(
        make_gradients(config, dataset, model, augmentation),
        shapes,
        plan_batches(config.partition, *sizes, dataset.targets, config.seed).shard_sizes,
        INDEX_BYTES + (_nbytes(example) if config.stream else 0),
        0 if config.stream else _pool_bytes(dataset),
        steps_of_epoch(config, dataset.train_examples),
    )
    metrics = make_metrics(config, dataset, model, shapes, example)
    own = {"dataset": dataset, "model": model, "metrics": metrics, "augmentation": augmentation}
    return Job(**vars(_plan(config, grid, task)), **own)


def without_model(config: Config, why: str) -> ConfigurationError:
    """The error for `--parameters` where a model is needed."""
    return ConfigurationError(
        f"--parameters={config.parameters} plans a model without building it, and {why}"
    )


def _plan(config: Config, grid: tuple[int, int], task: _Task) -> Plan:
    layout, counted = make_layout(config, grid, task.shard_sizes), in_steps(config, task.epoch)
    steps = count_steps(counted)
    parts = _parts(counted, task.grad_fn, layout, steps)
    averages = make_running_averages(config, steps)
    method = with_running_averages(build_method(parts), **averages)
    mesh = make_mesh(layout, shape=mesh_shape(config))
    state = RoundFn(method, layout, mesh).shapes(*task.model_shapes)
    return Plan(
        config=config,
        in_steps=counted,
        layout=layout,
        mesh=mesh,
        method=method,
        steps=steps,
        lengths=tuple(schedule(method, steps)),
        learning_rate=periods.rates(parts.schedule),
        zeta=topology.zeta(parts.matrix) if METHODS[config.method].network else None,
        compressors=parts.compressors,
        running_averages=averages,
        model_shapes=task.model_shapes,
        state=state,
        example_bytes=task.example_bytes,
        pool_bytes=task.pool_bytes,
    )


def _parts(config: Config, grad_fn: GradFn, layout: Layout, steps: int) -> Parts:
    rate = make_schedule(config, steps)
    return Parts(
        config=config,
        grad_fn=grad_fn,
        optimizer=make_optimizer(config, rate),
        schedule=rate,
        layout=layout,
        steps=steps,
        period=make_period(config, rate, steps),
        matrix=mixing_matrix(config, layout),
        compressors=make_compressors(config),
    )


def _data_folder(config: Config) -> str | None:
    return config.data_dir or os.environ.get("TFDS_DATA_DIR")


def _nbytes(example: Tree) -> int:
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(example))


def _pool_bytes(dataset: Dataset) -> int:
    """Bytes of all examples; images are stored as uint8, everything else takes 4 bytes."""
    item = 1 if len(dataset.input_shape) == 3 else 4
    example = math.prod(dataset.input_shape) * item + 4
    return (dataset.train_examples + dataset.test_examples) * example


def make_round_fn(plan: Plan, pool: Any = ()) -> RoundFn:
    """The compiled round of a plan, in chunks small enough for the progress bar and for memory.

    Args:
      pool: the examples that batches index; none for counting alone.
    """
    fits = CHUNK_BYTES // (plan.example_bytes * plan.layout.workers * plan.config.batch_size)
    chunk = max(1, min(CHUNK_STEPS, fits))
    return RoundFn(plan.method, plan.layout, plan.mesh, pool, max_chunk=chunk)


def measure_every(plan: Plan) -> int:
    """Steps between measurements; 0 for the end of every round."""
    every = plan.config.eval_every
    return max(1, plan.steps // MEASUREMENTS) if every is None else every


def save_every(plan: Plan) -> int:
    """Steps between checkpoints; 0 for none."""
    every = plan.config.checkpoint_every
    return max(1, plan.steps // CHECKPOINTS) if every is None else every


def initial_state(job: Job, round_fn: RoundFn) -> TrainState:
    """The state before the first step, from the seed of the config."""
    key = jax.random.key(job.config.seed)
    params, model_state = job.model.init(key)
    return round_fn.init(params, key, model_state)
