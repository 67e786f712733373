"""What a run is: its flags, their groups and their meaning; from the command line to one frozen
record and back."""

import dataclasses
import hashlib
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from absl.flags import FLAGS

from jaxlocal import ConfigurationError

# Exit statuses: what the machine or the training did, a user's mistake, Ctrl-C.
FAILED, USAGE, INTERRUPTED = 1, 2, 130


def _flag(group: str, default: Any, text: str, kind: type | None = None) -> Any:
    """A field that is also a flag; `kind` where the default, None, does not tell the type."""
    metadata = {"group": group, "help": " ".join(text.split()), "kind": kind or type(default)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. Every field is the flag of its name."""

    method: str = _flag(
        "method",
        "local_sgd",
        "data_parallel, local_sgd, post_local_sgd, swap, mll_sgd, hl_sgd or cooperative_sgd.",
    )
    local_steps: int = _flag(
        "method",
        4,
        "Ticks between averages: H_base of the period, or τ between hub averages in mll_sgd and "
        "hl_sgd.",
    )
    hub_period: int = _flag(
        "method", 1, "q: hub averages between two mixings of hubs, in mll_sgd and hl_sgd."
    )
    period: str | None = _flag(
        "method",
        None,
        """Rule for H, the ticks of a round: constant, quadratic, linear, cubic, post_local or swap.
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
    switch_tick: int | None = _flag(
        "method",
        None,
        "post_local and swap: the tick until which H = 1. By default half of the run.",
        int,
    )
    optimizer_state: str = _flag(
        "method",
        "keep",
        "What averages do to the workers' optimizer states: keep, average or reset.",
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
        """Probability that a worker takes its step at a tick: one number, a hub's or all workers'
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
        "How a device runs its workers: vmap or map. By default what is fast for the model.",
        str,
    )
    dataset: str = _flag(
        "data",
        "digits",
        "digits, mnist, mnist_binary, cifar10, least_squares, perceptron or two_quadratics:ROUNDS.",
    )
    data_dir: str | None = _flag(
        "data", None, "Folder of prepared TensorFlow Datasets; else TFDS_DATA_DIR.", str
    )
    partition: str = _flag(
        "data",
        "iid",
        """Who holds what: iid (a shuffle an epoch, disjoint shards), fresh (draws from the whole
        set), sorted or
        sorted:OFFSET (shards of the set sorted by label, shifted by a part of a shard), unequal or
        unequal:FRACTIONS.""",
    )
    batch_size: int = _flag("data", 16, "Examples in a worker's batch.")
    train_eval_examples: int = _flag(
        "data", 0, "Training loss over a fixed sample of so many examples; 0: over all."
    )
    model: str = _flag(
        "model",
        "mll_cnn",
        "logistic, linear, mlp, mll_cnn, resnet18_layer_norm or resnet18_group_norm.",
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
    warmup_ticks: int = _flag(
        "optimizer", 0, "Ticks over which the learning rate rises linearly to its peak."
    )
    weight_decay: float = _flag(
        "optimizer",
        0.0,
        "λ: decoupled in adamw, lamb and lion, added to the gradient in the others.",
    )
    momentum: float = _flag("optimizer", 0.9, "β of sgd and nesterov.")
    ticks: int | None = _flag(
        "run", None, "Local steps of every worker in all. By default 440.", int
    )
    rounds: int | None = _flag(
        "run", None, "Rounds in all, instead of ticks, where H does not follow a schedule.", int
    )
    stop_train_loss: float | None = _flag(
        "run", None, "Stop when the training loss is measured below this.", float
    )
    eval_every: int | None = _flag(
        "run",
        None,
        "Ticks between measurements; 0: at the end of every round. By default about 25 a run.",
        int,
    )
    seed: int = _flag("run", 0, "Seeds the model, the data order and the workers' rates.")
    workdir: str | None = _flag(
        "run",
        None,
        "Folder for metrics.jsonl, summary.json, curves.png and flags.txt. By default one under "
        "runs/.",
        str,
    )

    def flag_lines(self) -> list[str]:
        """The flags that make this run again, defaults that are None left out."""
        values = dataclasses.asdict(self)
        return [f"--{name}={value}" for name, value in values.items() if value is not None]


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Register a flag for every field."""
    define: dict[type, Callable] = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    for field in dataclasses.fields(Config):
        kind, text = field.metadata["kind"], field.metadata["help"]
        define[kind](field.name, field.default, text, flag_values=values)


def from_flags(values: flags.FlagValues = FLAGS) -> Config:
    """The config that the flags hold."""
    chosen: dict[str, Any] = {f.name: values[f.name].value for f in dataclasses.fields(Config)}
    return Config(**chosen)


def help_text(about: str) -> str:
    """The flags by groups."""
    lines = [about.strip(), "", "Flags, of which --flagfile=FILE reads more from a file:"]
    group = None
    for field in dataclasses.fields(Config):
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines += ["", f"{group}:"]
        default = "" if field.default is None else f" [{field.default}]"
        text = field.metadata["help"] + default
        lines += textwrap.wrap(
            text, 100, initial_indent=f"  --{field.name}: ", subsequent_indent="      "
        )
    return "\n".join(lines)


def run_binary(main: Callable[[Config], int | None], about: str) -> None:
    """Run main on the command line's config.

    A user's mistake ends in one sentence and exit status 2.
    """

    def parse(argv: list[str]) -> list[str]:
        if {"-h", "--help", "-help", "--helpfull", "--helpshort"} & set(argv[1:]):
            print(help_text(about) + _extra_help())
            sys.exit(0)
        try:
            rest = FLAGS(argv)
        except flags.Error as error:
            fail(str(error))
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)  # what libraries say of themselves is noise here
        if rest[1:]:
            fail(f"what is {rest[1]!r}? flags look like --name=value")
        return rest

    def guarded(argv: list[str]) -> int | None:
        try:
            status = main(from_flags())
        except ConfigurationError as error:
            fail(str(error))
        except OSError as error:
            status = _say(f"{error.filename or 'writing'}: {error.strerror}", FAILED)
        except KeyboardInterrupt:
            status = _say("interrupted", INTERRUPTED)
        if status == INTERRUPTED:
            sys.stdout.flush()
            os._exit(status)  # a compilation that goes on in the background would crash at exit
        return status

    app.run(guarded, flags_parser=parse)


def _extra_help() -> str:
    own = FLAGS.get_key_flags_for_module(sys.modules["__main__"].__file__ or "")
    lines = [f"  --{flag.name}: {flag.help} [{flag.default}]" for flag in own]
    return "\n\nthis binary:\n" + "\n".join(lines) if lines else ""


def fail(sentence: str) -> NoReturn:
    """Say what is wrong and end with the status of a user's mistake."""
    sys.exit(_say(sentence, USAGE))


def _say(sentence: str, status: int) -> int:
    print("error: " + " ".join(sentence.split()), file=sys.stderr, flush=True)
    return status


def default_workdir(config: Config) -> Path:
    """A folder of its own for every choice of flags."""
    lines = dataclasses.replace(config, workdir=None).flag_lines()
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
    return Path("runs") / f"{config.method}-{config.dataset.replace(':', '_')}-{digest}"
