"""From a config to what it names: data, model, workers, optimizer, method; or one sentence about
what does not fit."""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jaxlocal
from experiments.building.checks import check_numbers, mesh_shape
from experiments.building.compressors import make_compressors
from experiments.building.config import Config
from experiments.building.methods import METHODS, Parts
from experiments.building.schedules import (
    HUB_METHODS,
    count_fragments,
    count_steps,
    make_optimizer,
    make_period,
    make_schedule,
)
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh, periods
from jaxlocal.communication import topology
from jaxlocal.data import CropFlip, Dataset, crop_and_flip, load, parse_augmentation, plan_batches
from jaxlocal.errors import lookup
from jaxlocal.models import Model, build, in_precision, outputs_for
from jaxlocal.models.supervised import training_loss
from jaxlocal.stages.gradient import GradFn
from jaxlocal.stages.overlap import fragments_of
from jaxlocal.types import Compressor, Method

MEASUREMENTS, CHECKPOINTS = 25, 10  # about so many a run
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
NETWORKED = (*HUB_METHODS, "cooperative_sgd")
CHUNK_STEPS, CHUNK_BYTES = 256, 64 << 20  # the most that is dispatched at once, of batches

# The released rate distributions of the MLL-SGD experiments, of a hub of N workers.
RATES: dict[str, Callable[[int], list[float]]] = {
    "full": lambda n: [1.0] * n,
    "fixed": lambda n: [0.55] * n,
    "uniform": lambda n: [round((i + 1) / n, 12) for i in range(n)],
    "slow_one": lambda n: [0.1] + [0.6] * (n - 1),
    "fast_one": lambda n: [1.0] + [0.5] * (n - 1),
    "straggler": lambda n: [0.6] + [0.9] * (n - 1),
}


_load = functools.lru_cache(maxsize=8)(load)  # runs of one process share what is read of it


class Job(NamedTuple):
    """All that a config means, built but not run."""

    config: Config
    dataset: Dataset | None  # None for a plan of a model that is not built
    model: Model | None
    layout: Layout
    method: Method
    steps: int
    learning_rate: Callable[[int], float]  # η by step, in float64
    zeta: float | None  # of the hub network, where there is one
    augmentation: CropFlip | None  # of the training images
    compressors: dict[str, Compressor]  # by what they compress: "gradient", "reset" or "sync"


def build_job(config: Config) -> Job:
    """The job of a config; raises ConfigurationError for what does not fit."""
    check_numbers(config)
    layout_shape = worker_grid(config)
    dataset = model = None
    grad_fn: GradFn = lambda *_: ({}, {}, {})
    augmentation = parse_augmentation(config.augment)
    if config.parameters is None:
        folder = config.data_dir or os.environ.get("TFDS_DATA_DIR")
        dataset = _load(config.dataset, folder, config.seed)
        model = build_model(config, dataset)
        grad_fn = _gradients(config, dataset, model, augmentation)
    layout = _layout(config, layout_shape, dataset)
    steps = count_steps(config)
    if config.warmup_steps > steps:
        raise ConfigurationError(
            f"a warm-up of {config.warmup_steps} steps is longer than the run of {steps}"
        )
    schedule = make_schedule(config, steps)
    period = make_period(config, schedule, steps)
    matrix = _mixing_matrix(config, layout)
    optimizer = make_optimizer(config, schedule)
    compressors = _fitting(make_compressors(config), config, model)
    fragments_of(model_shapes(config, model)[0], count_fragments(config))
    parts = Parts(config, grad_fn, optimizer, layout, period, matrix, compressors)
    method = METHODS[config.method](parts)
    zeta = topology.zeta(matrix) if config.method in NETWORKED else None
    rates = periods.rates(schedule)
    return Job(
        config, dataset, model, layout, method, steps, rates, zeta, augmentation, compressors
    )


def model_shapes(config: Config, model: Model | None) -> tuple[Any, Any]:
    """Shapes of one model's parameters and state; of a model that is not built, one flat tensor."""
    if model is None:
        return {"all": jax.ShapeDtypeStruct((config.parameters or 0,), np.float32)}, {}
    return jax.eval_shape(model.init, jax.random.key(0))


def _fitting(
    compressors: dict[str, Compressor], config: Config, model: Model | None
) -> dict[str, Compressor]:
    """The compressors, of which each fits the model's tensors."""
    for compressor in compressors.values():
        jax.eval_shape(compressor.init, model_shapes(config, model)[0])
    return compressors


def _gradients(
    config: Config, dataset: Dataset, model: Model, augmentation: CropFlip | None
) -> GradFn:
    """The gradient of a worker's batch, augmented where it comes from the pool: a stream's is."""
    loss = training_loss(model, dataset.normalize, dataset.classes)
    if augmentation is not None and len(dataset.input_shape) != 3:
        raise ConfigurationError(
            f"--augment={config.augment} is for images; the examples of {config.dataset} have "
            f"shape {dataset.input_shape}"
        )

    def augmented(params, model_state, batch, key):
        inputs = crop_and_flip(batch["inputs"], batch["shift"], batch["flip"])
        return loss(params, model_state, {**batch, "inputs": inputs}, key)

    resident = augmentation is not None and not config.stream
    grad_fn = jaxlocal.gradients(augmented if resident else loss, stateful=True)
    return jaxlocal.accumulate(grad_fn, config.accumulation)


def mesh_of(job: Job) -> Mesh:
    """Over which devices the workers are spread."""
    return make_mesh(job.layout, shape=mesh_shape(job.config))


def make_round_fn(job: Job, data: Any = ()) -> RoundFn:
    """The job's round, in chunks that keep the progress bar moving and the batches small."""
    item = 4  # an index
    if job.config.stream and job.dataset is not None:
        item += sum(np.asarray(x).nbytes for x in job.dataset.train_source()[0].values())
    fits = CHUNK_BYTES // (item * job.config.workers * job.config.batch_size)
    most = min(CHUNK_STEPS, fits)
    return RoundFn(job.method, job.layout, mesh_of(job), data, max_chunk=most)


def measure_every(job: Job) -> int:
    """Steps between measurements."""
    every = job.config.eval_every
    return max(1, job.steps // MEASUREMENTS) if every is None else every


def save_every(job: Job) -> int:
    """Steps between checkpoints; 0 for none."""
    every = job.config.checkpoint_every
    return max(1, job.steps // CHECKPOINTS) if every is None else every


def build_model(config: Config, dataset: Dataset) -> Model:
    """The model, started where the dataset says if it says so."""
    outputs = outputs_for(dataset.classes) if dataset.classes else 1
    if config.model == "linear" and dataset.classes:
        raise ConfigurationError(
            f"linear is a regression, and {config.dataset} has {dataset.classes} classes"
        )
    model = build(config.model, dataset.input_shape, outputs)
    if lookup("precision", config.precision, PRECISIONS) != jnp.float32:
        model = in_precision(model, PRECISIONS[config.precision])
    if dataset.start is None:
        return model
    if config.model != "linear":
        raise ConfigurationError(
            f"{config.dataset} says where its linear model starts; got --model={config.model}"
        )
    start = jnp.asarray(dataset.start)

    def init(key):
        params, model_state = model.init(key)
        return jax.tree.map(lambda x: start.reshape(x.shape).astype(x.dtype), params), model_state

    return model._replace(init=init)


def _mixing_matrix(config: Config, layout: Layout) -> np.ndarray:
    """H of the hub network; that of one hub, [[1]], for methods without one."""
    if config.method not in NETWORKED:
        if config.hub_graph != "complete":
            raise ConfigurationError(
                f"{config.method} has no hub graph, and --hub_graph={config.hub_graph} was given"
            )
        return np.ones((1, 1))
    if config.method == "hl_sgd" and config.hub_graph != "complete":
        raise ConfigurationError(
            f"hl_sgd mixes all hubs with each other; --hub_graph={config.hub_graph} needs mll_sgd"
        )
    graph = topology.hub_graph(config.hub_graph, layout.hubs, config.seed)
    return topology.mixing_matrix(graph, layout.hub_weight)


def worker_grid(config: Config) -> tuple[int, int]:
    """Hubs and workers a hub."""
    if config.method == "cooperative_sgd":
        if config.hubs not in (1, config.workers):
            raise ConfigurationError(
                f"in cooperative_sgd every worker is a hub: {config.workers} workers, "
                f"--hubs={config.hubs}"
            )
        return config.workers, 1
    if config.hubs > 1 and config.method not in HUB_METHODS:
        raise ConfigurationError(
            f"{config.method} has no hubs, and --hubs={config.hubs} was asked for; use mll_sgd "
            f"or hl_sgd"
        )
    if config.workers % config.hubs:
        raise ConfigurationError(f"{config.workers} workers do not divide into {config.hubs} hubs")
    return config.hubs, config.workers // config.hubs


def _layout(config: Config, shape: tuple[int, int], dataset: Dataset | None) -> Layout:
    per_hub = config.workers if config.method == "cooperative_sgd" else shape[1]
    if dataset is not None:
        sizes = (dataset.train_examples, *shape, config.batch_size)
        held = plan_batches(config.partition, *sizes, dataset.targets, config.seed).shard_sizes
    if config.worker_weights == "uniform":
        weights: Any = 1.0
    elif config.worker_weights == "data":
        if dataset is None:
            raise ConfigurationError(
                "--worker_weights=data needs a dataset, and --parameters plans without one"
            )
        weights = held
    else:
        weights = _numbers("worker_weights", config.worker_weights, ("uniform", "data"))
    named = lookup("rates", config.rates, RATES)(per_hub) if config.rates[:1].isalpha() else None
    rates = named or _numbers("rates", config.rates, tuple(RATES))
    return Layout(*shape, weights=weights, rates=rates)


def _numbers(flag: str, text: str, names: tuple[str, ...]) -> list[float] | float:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(
            f"--{flag}={text} is neither {', '.join(names)} nor numbers separated by commas"
        ) from None
    return values if len(values) > 1 else values[0]
