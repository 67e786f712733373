"""What a run is: its flags, their groups and their meaning, as one frozen record."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any


def _flag(
    group: str, default: Any, text: str, kind: type | None = None, identity: bool = True
) -> Any:
    """A field that is also a flag; `kind` where the default, None, does not tell the type;
    `identity` says whether it makes a run another one."""
    metadata = {
        "group": group,
        "help": " ".join(text.split()),
        "kind": kind or type(default),
        "identity": identity,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. Every field is the flag of its name."""

    method: str = _flag(
        "method",
        "local_sgd",
        """data_parallel, local_sgd, post_local_sgd, swap, mll_sgd, hl_sgd, cooperative_sgd, slowmo,
        diloco, streaming_diloco; with compressed messages ef_sgd, qsparse_local_sgd, cser, csea,
        cser_pl or sparse_loco.""",
    )
    local_steps: int = _flag(
        "method",
        4,
        "Steps between averages: H_base of the period, or τ between hub averages in mll_sgd and "
        "hl_sgd.",
    )
    hub_period: int = _flag(
        "method", 1, "q: hub averages between two mixings of hubs, in mll_sgd and hl_sgd."
    )
    period: str | None = _flag(
        "method",
        None,
        """Rule for H, the steps of a round: constant, quadratic, linear, cubic, post_local or swap.
        By default quadratic for local_sgd and constant for the other methods.""",
        str,
    )
    period_coefficient: float | None = _flag(
        "method",
        None,
        """α of the quadratic (linear, cubic) rule H = max(H_base, ⌊(α/η)²⌋). By default such that
        the rule gives H_base at the peak learning rate.""",
        float,
    )
    switch_step: int | None = _flag(
        "method",
        None,
        "post_local and swap: the step until which H = 1. By default half of the run.",
        int,
    )
    optimizer_state: str = _flag(
        "method",
        "keep",
        "What averages do to the workers' optimizer states: keep, average or reset.",
    )
    model_state: str = _flag(
        "method",
        "keep",
        """What models keep besides parameters, such as batch statistics: keep every worker's own
        (the average model is evaluated with their mean), average them whenever models are averaged,
        or reestimate: keep, and estimate them anew on the average model for every evaluation.""",
    )
    outer_optimizer: str | None = _flag(
        "method",
        None,
        """slowmo, diloco, streaming_diloco, sparse_loco: what steps on the difference of averages;
        one of --optimizer. By default nesterov in the two dilocos, sgd in the others.""",
        str,
    )
    outer_learning_rate: float | None = _flag(
        "method",
        None,
        "Its learning rate. By default 0.7 in the two dilocos, 1 in the others.",
        float,
    )
    outer_momentum: float | None = _flag(
        "method",
        None,
        "Its momentum. By default 0.7 in slowmo, 0.9 in the two dilocos, 0 in sparse_loco.",
        float,
    )
    fragments: int | None = _flag(
        "method",
        None,
        """P of streaming_diloco: parts of the model that are synchronised in turn, each once in H
        steps. By default 2.""",
        int,
    )
    delay_steps: int | None = _flag(
        "method",
        None,
        "τ of streaming_diloco: steps that run beside a synchronisation. By default 1.",
        int,
    )
    mixing_factor: float | None = _flag(
        "method",
        None,
        "α of streaming_diloco: the share of its own model that a worker keeps. By default 0.5.",
        float,
    )
    accumulation: int = _flag(
        "method",
        1,
        "Parts into which a worker's batch is split, one gradient after another, to save memory.",
    )
    gradient_compressor: str | None = _flag(
        "compression",
        None,
        """What is said of gradients and updates at every step: identity, zero, grbs:RATIO,
        random_k:RATIO, top_k:RATIO[:chunk|tensor|model], sign, qsgd:BITS, int8, bfloat16 or
        powersgd:RANK; the values of a sparse one may be coded too, as in top_k:64+int8. For cser
        (C2, by default grbs:64), ef_sgd (grbs:32) and data_parallel (nothing is compressed).""",
        str,
    )
    reset_compressor: str | None = _flag(
        "compression",
        None,
        """C1, what is said of the errors at a reset. For cser (by default grbs:4), cser_pl (grbs:8)
        and csea (grbs:32).""",
        str,
    )
    sync_compressor: str | None = _flag(
        "compression",
        None,
        """What is said of how far a model has come. For qsparse_local_sgd (by default grbs:8),
        sparse_loco (top_k:64), and the hub averages of mll_sgd and hl_sgd (nothing is
        compressed).""",
        str,
    )
    cser_implementation: int | None = _flag(
        "compression",
        None,
        """Of cser: 1, where errors are reset, or 2, where the chosen part of the models is
        averaged. By default 1.""",
        int,
    )
    error_decay: float | None = _flag(
        "compression",
        None,
        "Of sparse_loco: what is left of an error after a round. By default 0.95.",
        float,
    )
    workers: int = _flag("workers", 8, "Workers in all.")
    hubs: int = _flag("workers", 1, "Hubs that the workers are spread over evenly.")
    hub_graph: str = _flag(
        "workers",
        "complete",
        """Who mixes with whom: complete, ring, path, star, erdos_renyi:PROBABILITY:SEED, or a file
        with a row of 0s and 1s for each hub. Hubs in mll_sgd, workers in cooperative_sgd.""",
    )
    rates: str = _flag(
        "workers",
        "1",
        """Probability that a worker takes its step at a step: one number, a hub's or all workers'
        separated by commas, or a released distribution: full, fixed, uniform, slow_one, fast_one,
        straggler.""",
    )
    worker_weights: str = _flag(
        "workers",
        "uniform",
        "Weights of the average: uniform, data (as the workers' shares of the data), or numbers "
        "separated by commas.",
    )
    worker_map: str | None = _flag(
        "workers",
        None,
        "How a device runs its workers: vmap, map or blocks:N. By default what is fast.",
        str,
    )
    mesh: str | None = _flag(
        "workers",
        None,
        """Devices, as HxW: the hubs are spread over H, a hub's workers over W; as HxWxM every
        worker is split over M besides. By default as many as the workers divide over.""",
        str,
        identity=False,
    )
    dataset: str = _flag(
        "data",
        "digits",
        """digits, docstrings[:LENGTH], mnist_binary, least_squares, perceptron,
        two_quadratics:ROUNDS, or any image set of TensorFlow Datasets that is prepared: mnist,
        cifar10, cifar100, fashion_mnist, emnist/letters, ….""",
    )
    data_dir: str | None = _flag(
        "data",
        None,
        "Folder of prepared TensorFlow Datasets; else TFDS_DATA_DIR.",
        str,
        identity=False,
    )
    partition: str = _flag(
        "data",
        "iid",
        """Who holds what: iid (a shuffle an epoch, disjoint shards), fresh (draws from the whole
        set), sorted or sorted:OFFSET (shards of the set sorted by label, shifted by a part of a
        shard), dirichlet or dirichlet:ALPHA (every label spread over workers by a Dirichlet draw),
        unequal or unequal:FRACTIONS.""",
    )
    plot_partition: bool = _flag(
        "data", False, "Draw who holds what, as partition.png.", identity=False
    )
    augment: str = _flag("data", "none", "Of images: none, or of crop[:PAD] and flip, by commas.")
    stream: bool = _flag(
        "data",
        False,
        """Read examples while training, by processes of their own, instead of keeping the training
        set on the device. The numbers are the same.""",
    )
    stream_workers: int = _flag(
        "data", 2, "Processes that read; 0: threads of this one.", identity=False
    )
    batch_size: int = _flag("data", 16, "Examples in a worker's batch.")
    train_eval_examples: int = _flag(
        "data", 0, "Training loss over a fixed sample of so many examples; 0: over all."
    )
    test_eval_examples: int = _flag(
        "data", 0, "Test metrics over a fixed sample of so many examples; 0: over all."
    )
    model: str = _flag(
        "model",
        "mll_cnn",
        """logistic, linear, mlp, mll_cnn, small_resnet_NORM or resnet18_NORM with layer_norm or
        batch_norm for NORM, resnet18_group_norm, small_transformer or transformer.""",
    )
    precision: str = _flag(
        "model",
        "float32",
        "What the model computes in: float32 or bfloat16; parameters and averages are float32.",
    )
    parameters: int | None = _flag(
        "model",
        None,
        "Plan a model of so many parameters without building it; then --model and --dataset are "
        "names.",
        int,
    )
    optimizer: str = _flag(
        "optimizer", "sgd", "sgd, nesterov, adam, adamw, lamb, lion, rmsprop or adagrad."
    )
    learning_rate: float = _flag("optimizer", 0.05, "Peak learning rate η.")
    schedule: str = _flag(
        "optimizer",
        "cosine",
        """Learning rate after warm-up: constant, cosine, linear, step (a tenth at 1/3 and 2/3 of
        the run) or cosine_step (the power of two nearest to cosine).""",
    )
    warmup_steps: int = _flag(
        "optimizer", 0, "Steps over which the learning rate rises linearly to its peak."
    )
    weight_decay: float = _flag(
        "optimizer",
        0.0,
        "λ: decoupled in adamw, lamb and lion, added to the gradient in the others.",
    )
    momentum: float = _flag("optimizer", 0.9, "β of sgd and nesterov.")
    steps: int | None = _flag(
        "run", None, "Local steps of every worker in all. By default 440.", int
    )
    rounds: int | None = _flag(
        "run", None, "Rounds in all, instead of steps, where H does not follow a schedule.", int
    )
    stop_train_loss: float | None = _flag(
        "run", None, "Stop when the training loss is measured below this.", float
    )
    eval_every: int | None = _flag(
        "run",
        None,
        "Steps between measurements; 0: at the end of every round. By default about 25 a run.",
        int,
    )
    seed: int = _flag("run", 0, "Seeds the model, the data order and the workers' rates.")
    seeds: int = _flag(
        "run", 1, "Runs with so many seeds from --seed on: their mean and its standard error."
    )
    checkpoint_every: int | None = _flag(
        "run",
        None,
        """Steps between checkpoints, from which the same command goes on; 0: none. By default about
        10 a run.""",
        int,
        identity=False,
    )
    keep: int = _flag("run", 2, "How many checkpoints stay, the newest.", identity=False)
    export: bool = _flag(
        "run",
        False,
        "Write the average model at the end, as a Flax checkpoint and as safetensors.",
        identity=False,
    )
    workdir: str | None = _flag(
        "run",
        None,
        "Folder for all that the run leaves. By default one under runs/.",
        str,
        identity=False,
    )

    coordinator_address: str | None = _flag(
        "processes",
        None,
        """HOST:PORT where process 0 of several waits for the others. A run of experiments.train on
        several processes is started on each, with the same flags but for --process_id, in a folder
        that all share.""",
        str,
        identity=False,
    )
    process_count: int | None = _flag("processes", None, "How many.", int, identity=False)
    process_id: int | None = _flag(
        "processes", None, "Which of them this is, from 0 on.", int, identity=False
    )
    distributed: bool = _flag(
        "processes",
        False,
        "Ask the cluster for all three: Slurm, Open MPI, Kubernetes or TPU.",
        identity=False,
    )

    def flag_lines(self) -> list[str]:
        """The flags that make this run again, on any number of processes; defaults that are None
        left out."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        here = [f.name for f in dataclasses.fields(self) if f.metadata["group"] == "processes"]
        return [
            _line(name, value)
            for name, value in values.items()
            if value is not None and name not in here
        ]

    def identity_lines(self) -> list[str]:
        """Those flags that make this run another one than a run without them: where it lies and
        how often it is saved do not."""
        return [line for line in self.flag_lines() if line.split("=")[0] not in PLACE]


def _line(name: str, value: Any) -> str:
    """A flag as it stands in a file, where booleans are written as absl reads them."""
    return f"--{name}={str(value).lower() if isinstance(value, bool) else value}"


# The flags that do not.
PLACE = {f"--{f.name}" for f in dataclasses.fields(Config) if not f.metadata["identity"]}


def default_workdir(config: Config) -> Path:
    """A folder of its own for every choice of flags."""
    digest = hashlib.sha256("\n".join(config.identity_lines()).encode()).hexdigest()[:8]
    dataset = config.dataset.replace(":", "_").replace("/", "_")
    return Path("runs") / f"{config.method}-{dataset}-{digest}"
