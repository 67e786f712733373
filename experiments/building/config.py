"""What a run is: its flags and their meaning, as one frozen record."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

from experiments.building.flags import MethodFlags, flag

_workers = functools.partial(flag, "workers")
_data = functools.partial(flag, "data")
_model = functools.partial(flag, "model")
_optimizer = functools.partial(flag, "optimizer")
_run = functools.partial(flag, "run")
_processes = functools.partial(flag, "processes", identity=False)


@dataclasses.dataclass(frozen=True)
class Config(MethodFlags):
    """A run. Every field is the flag of its name."""

    workers: int = _workers(8, "Number of workers.")
    hubs: int = _workers(1, "Number of hubs, over which the workers are spread evenly.")
    hub_graph: str = _workers(
        "complete",
        """Graph of the hubs that average with each other in mll_sgd, or of the workers in
        cooperative_sgd: complete, ring, path, star, erdos_renyi:PROBABILITY:SEED, or a file with a
        row of 0s and 1s for each hub.""",
    )
    rates: str = _workers(
        "1",
        """Probability with which a worker takes a step: one number; numbers separated by commas,
        for the workers of a hub or for all workers; or a released distribution: full, fixed,
        uniform, slow_one, fast_one, straggler.""",
    )
    wait: bool = _workers(
        False,
        """Workers take all their steps, and averages wait for the slowest: --rates then lengthen
        the rounds, in time slots, and no worker skips a step.""",
    )
    worker_weights: str = _workers(
        "uniform",
        """Weights of the average: uniform, data (the share of the data that a worker holds), or
        numbers separated by commas.""",
    )
    worker_map: str | None = _workers(
        None, "How a device runs its workers: vmap, map or blocks:N. By default the faster one."
    )
    mesh: str | None = _workers(
        None,
        """Devices, as HxW: the hubs are spread over H, the workers of a hub over W; as HxWxM every
        worker is also sharded over M. By default as many devices as the workers divide over.""",
        identity=False,
    )
    dataset: str = _data(
        "digits",
        """digits, docstrings[:LENGTH], mnist_binary, emnist_letters (from its original files),
        least_squares, perceptron[:squared_hinge[:MARGIN]], two_quadratics:ROUNDS, or any image
        dataset of TensorFlow Datasets that is prepared: mnist, cifar10, cifar100, fashion_mnist,
        emnist/letters, imagenet2012, ….""",
    )
    image_size: int | None = _data(
        None,
        """Height and width in pixels to which images of varying size are resized, with --stream: a
        random resized crop in training, the middle square in evaluations. By default 224.""",
    )
    data_dir: str | None = _data(
        None,
        "Folder of prepared TensorFlow Datasets. By default TFDS_DATA_DIR of the environment.",
        identity=False,
    )
    partition: str = _data(
        "iid",
        """Which examples a worker holds: iid (a shuffle in every epoch, disjoint shards), fresh
        (draws from the whole dataset), reused:STEPS (a subset that is drawn every STEPS steps, for
        all passes until the next), sorted or sorted:OFFSET (shards of the dataset sorted by label,
        shifted by a fraction of a shard), by_distance (sorted by the distance to the hyperplane of
        perceptron), dirichlet or dirichlet:ALPHA (every label is spread over the workers by a
        Dirichlet draw), unequal or unequal:FRACTIONS.""",
    )
    plot_partition: bool = _data(
        False, "Draw which examples the workers hold, as partition.png.", identity=False
    )
    augment: str = _data(
        "none",
        """Augmentation of training images: none, or some of crop[:PAD] or resized_crop[:AREA],
        flip, randaugment[:N:M] (with --stream), jitter[:STRENGTH] and pca[:STRENGTH], separated by
        commas.""",
    )
    stream: bool = _data(
        False,
        """Read examples during training, in separate processes, instead of keeping the training set
        on the device. The numbers are the same.""",
    )
    stream_workers: int = _data(
        2, "Processes that read; 0: threads of this process.", identity=False
    )
    batch_size: int = _data(16, "Examples in the batch of a worker.")
    train_eval_examples: int = _data(
        0, "Size of the fixed sample for the training loss; 0: all examples."
    )
    test_eval_examples: int = _data(
        0, "Size of the fixed sample for the test metrics; 0: all examples."
    )
    model: str = _model(
        "mll_cnn",
        """Any inputs: logistic, linear, mlp. Small images: mll_cnn, cifarnet, tiny_resnet_NORM,
        small_resnet_NORM or resnet18_NORM with layer_norm or batch_norm for NORM,
        resnet18_group_norm, wide_resnet_16_4, wide_resnet_40_8, small_vit, tiny_vit. Large images:
        resnet18_imagenet, resnet50, resnet50_v2, resnet101, resnet152, vit_s16, vit_b16. Sequences:
        small_transformer, transformer.""",
    )
    precision: str = _model(
        "float32",
        """Type in which the model computes: float32 or bfloat16. Parameters and averages are
        float32.""",
    )
    parameters: int | None = _model(
        None,
        """Plan a model with this number of parameters without building it; --model and --dataset
        are then ignored.""",
    )
    optimizer: str = _optimizer(
        "sgd", "sgd, nesterov, adam, adamw, lamb, lion, rmsprop or adagrad."
    )
    learning_rate: float = _optimizer(0.05, "Peak learning rate η.")
    schedule: str = _optimizer(
        "cosine",
        """Learning rate after the warm-up: constant, cosine, linear, step (see --decay_steps) or
        cosine_step (the power of two nearest to cosine).""",
    )
    decay_steps: str | None = _optimizer(
        None,
        """Steps of the run, separated by commas, from which on the schedule step multiplies the
        learning rate by --decay_factor. By default 1/3 and 2/3 of the run.""",
    )
    decay_epochs: str | None = _optimizer(None, "The same in epochs, such as 60,120,160.")
    decay_factor: float = _optimizer(0.1, "Factor of the schedule step.")
    warmup_steps: int = _optimizer(
        0, "Steps over which the learning rate rises linearly to its peak."
    )
    warmup_epochs: float | None = _optimizer(None, "The same in epochs.")
    weight_decay: float = _optimizer(
        0.0, "λ: decoupled in adamw, lamb and lion, added to the gradient in the others."
    )
    momentum: float = _optimizer(0.9, "β of sgd and nesterov.")
    clip_norm: float | None = _optimizer(
        None,
        """Largest norm of the gradient of all parameters, to which longer ones are scaled down: of
        each worker's, or of the average in data_parallel. By default gradients are not clipped.""",
    )
    label_smoothing: float = _optimizer(
        0.0, "ε: share of a training target that is spread evenly over the classes."
    )
    mixup: float = _optimizer(
        0.0,
        """α: each training example is mixed with the one before it in its batch, and so are their
        classes, with a share from Beta(α, α) for each worker and step; 0: none.""",
    )
    steps: int | None = _run(None, "Local steps that every worker takes. By default 440.")
    epochs: float | None = _run(
        None,
        """Epochs of the run, instead of --steps. An epoch is ⌊examples / (workers · batch size)⌋
        steps; on hubs the run is rounded down to a multiple of τ steps.""",
    )
    rounds: int | None = _run(
        None, "Number of rounds, instead of --steps, where H does not follow a schedule."
    )
    stop_train_loss: float | None = _run(
        None, "Stop when a measurement of the training loss is below this value."
    )
    eval_every: int | None = _run(
        None,
        """Steps between measurements; 0: at the end of every round. By default about 25
        measurements in a run.""",
    )
    ema_decay: float | None = _run(
        None,
        """β of an exponential moving average (EMA) of the average model, which is measured beside
        it and changes nothing in training: the decay of one step, such as 0.999. A round of H steps
        decays by β^H.""",
    )
    swa_start: int | None = _run(
        None,
        """Step after which the average models at the ends of rounds are averaged, each with the
        weight of its H steps, and measured like that of --ema_decay: stochastic weight averaging
        (SWA).""",
    )
    seed: int = _run(0, "Seed of the model, of the order of the data and of the workers' rates.")
    seeds: int = _run(
        1,
        """Number of runs, with the seeds from --seed on; their mean and its standard error are
        reported.""",
    )
    checkpoint_every: int | None = _run(
        None,
        """Steps between checkpoints, from which the same command resumes; 0: none. By default about
        10 checkpoints in a run.""",
        identity=False,
    )
    keep: int = _run(
        2,
        """Number of the newest checkpoints that are kept; with 1 there is none to fall back to if
        it is damaged.""",
        identity=False,
    )
    export: bool = _run(
        False,
        "Write the average model at the end, as a Flax checkpoint and as safetensors.",
        identity=False,
    )
    workdir: str | None = _run(
        None,
        "Folder for everything that the run writes. By default a folder under runs/.",
        identity=False,
    )
    coordinator_address: str | None = _processes(
        None,
        """HOST:PORT at which process 0 waits for the others. For a run of experiments.train on
        several processes, start the same command on each, with another --process_id and a --workdir
        that all share. A secret in that folder, or JAXLOCAL_SECRET, keeps strangers out.""",
    )
    process_count: int | None = _processes(None, "Number of processes.")
    process_id: int | None = _processes(None, "Number of this process, counted from 0.")
    distributed: bool = _processes(
        False,
        """Ask the cluster for the three flags above: Slurm, Open MPI, Kubernetes or TPU.""",
    )

    def flag_lines(self) -> list[str]:
        """The flags that reproduce this run, on any number of processes; without those that are
        None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        joining = {f.name for f in dataclasses.fields(self) if f.metadata["group"] == "processes"}
        return [
            _line(name, value)
            for name, value in values.items()
            if value is not None and name not in joining
        ]

    def identity_lines(self) -> list[str]:
        """The flags that identify this run: not where it is stored nor how often it is saved."""
        return [line for line in self.flag_lines() if line.split("=")[0] not in PLACE]


def _line(name: str, value: Any) -> str:
    """A flag as a flag file has it; absl reads booleans in lower case."""
    return f"--{name}={str(value).lower() if isinstance(value, bool) else value}"


# The flags that do not identify a run.
PLACE = {f"--{f.name}" for f in dataclasses.fields(Config) if not f.metadata["identity"]}


def default_workdir(config: Config) -> Path:
    """The folder of a run without `--workdir`; runs that differ have different folders."""
    digest = hashlib.sha256("\n".join(config.identity_lines()).encode()).hexdigest()[:8]
    dataset = config.dataset.replace(":", "_").replace("/", "_")
    return Path("runs") / f"{config.method}-{dataset}-{digest}"
