"""Fields that are also flags, and the flags of the method and of compression.

Help texts read defaults from the table of methods.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxlocal.methods import METHODS


def flag(group: str, default: Any, text: str, identity: bool = True) -> Any:
    """Field of a dataclass that is also a flag.

    Args:
      group: under which `--help` lists it.
      default: None where the default depends on other flags.
      text: for `--help`.
      identity: whether another value makes another run.
    """
    metadata = {"group": group, "help": " ".join(text.split()), "identity": identity}
    return dataclasses.field(default=default, metadata=metadata)


_method = functools.partial(flag, "method")
_compression = functools.partial(flag, "compression")


def _by_value(values: Mapping[str, Any]) -> str:
    """Group names by their value.

    >>> _by_value({"slowmo": "sgd", "diloco": "nesterov", "sparse_loco": "sgd"})
    'sgd in slowmo and sparse_loco, nesterov in diloco'
    """
    groups: dict[Any, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return ", ".join(f"{value} in {_and(names)}" for value, names in groups.items())


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _other_periods() -> str:
    """The methods whose default period is not constant, each with its rule."""
    return _by_value({n: spec.period for n, spec in METHODS.items() if spec.period != "constant"})


def _outer(property: str) -> str:
    """A property of the default outer optimizer, of each method that has one."""
    defaults = {name: spec.outer_optimizer for name, spec in METHODS.items()}
    return _by_value({name: getattr(d, property) for name, d in defaults.items() if d})


def _compressed(what: str) -> str:
    """The default compressor, of each method that compresses this kind of message."""
    specs = {n: s.compressors[what] for n, s in METHODS.items() if what in s.compressors}
    return _by_value({name: spec or "none" for name, spec in specs.items()})


def _owners(flag: str) -> str:
    """The methods that have an option, each with its default."""
    owners = {name: spec for name, spec in METHODS.items() if flag in spec.own_options}
    return ", ".join(
        f"{name} (by default {spec.default(spec.own_options[flag])})"
        for name, spec in owners.items()
    )


@dataclasses.dataclass(frozen=True)
class MethodFlags:
    """The flags that choose a method and its options."""

    method: str = _method("local_sgd", f"{', '.join(METHODS)}.")
    local_steps: int = _method(
        4,
        """Steps between averages: H_base of the period; in mll_sgd and hl_sgd τ, the steps between
        hub averages.""",
    )
    hub_period: int = _method(
        1, "q: hub averages between two mixings of the hubs, in mll_sgd and hl_sgd."
    )
    period: str | None = _method(
        None,
        f"""Rule for H, the number of steps in a round: constant, quadratic (QSR), linear, cubic,
        post_local or swap. By default constant, but {_other_periods()}.""",
    )
    period_coefficient: float | None = _method(
        None,
        """α of the quadratic (linear, cubic) rule H = max(H_base, ⌊(α/η)²⌋). By default 0.25 of the
        peak learning rate for sgd and nesterov and 2.2 of it for the other optimizers, as the paper
        tunes them, or less where H would be more than H_base at the peak; for linear and cubic
        the value with which H begins to grow at the same learning rate.""",
    )
    warmup_local_steps: int | None = _method(
        None,
        """H of the rounds that start in the warm-up, for quadratic, linear and cubic. By default
        what the rule gives at the peak learning rate.""",
    )
    switch_step: int | None = _method(
        None, "For post_local and swap: the step until which H = 1. By default half of the run."
    )
    optimizer_state: str = _method(
        "keep", "What an average does to the workers' optimizer states: keep, average or reset."
    )
    model_state: str = _method(
        "keep",
        """Model state, such as batch statistics: keep (every worker keeps its state, and the
        average model is evaluated with the mean of these), average (with every average of models)
        or reestimate (keep, and estimate it on the average model before every evaluation).""",
    )
    outer_optimizer: str | None = _method(
        None,
        f"""Outer optimizer, which takes the change of the average model in a round as its
        gradient; one of those of --optimizer. Methods that have one, and its default:
        {_outer("name")}.""",
    )
    outer_learning_rate: float | None = _method(
        None, f"Learning rate of the outer optimizer. By default {_outer('learning_rate')}."
    )
    outer_momentum: float | None = _method(
        None, f"Momentum of the outer optimizer. By default {_outer('momentum')}."
    )
    fragments: int | None = _method(
        None,
        f"""P of {_owners("fragments")}: fragments of the model, which are synchronised in turn,
        each once in H steps.""",
    )
    delay_steps: int | None = _method(
        None, f"τ of {_owners('delay_steps')}: steps that overlap with a synchronisation."
    )
    mixing_factor: float | None = _method(
        None,
        f"""α of {_owners("mixing_factor")}: weight of a worker's own model where it is mixed with
        the synchronised one.""",
    )
    accumulation: int = _method(
        1,
        """Parts into which a worker's batch is divided; their gradients are computed one after
        another, which saves memory. Batch normalisation then takes the statistics of each part, a
        ghost batch, and dropout and mixup draw for each part.""",
    )
    gradient_compressor: str | None = _compression(
        None,
        f"""Compressor of gradients and updates, which are sent at every step: identity, zero,
        grbs:RATIO, grbs_tensors:RATIO:GROUPS, random_k:RATIO, top_k:RATIO[:chunk|tensor|model],
        sign, qsgd:BITS, int8, bfloat16 or powersgd:RANK; the values of a sparse one may be coded
        too, as in top_k:64+int8. By default {_compressed("gradient")}.""",
    )
    reset_compressor: str | None = _compression(
        None,
        f"""Compressor C1 of the residuals, which are sent at an error reset. By default
        {_compressed("reset")}.""",
    )
    sync_compressor: str | None = _compression(
        None,
        f"""Compressor of a model's change since the last synchronisation; in methods with hubs, of
        the messages to the hub. By default {_compressed("sync")}.""",
    )
    cser_implementation: str | None = _compression(
        None,
        f"""Implementation of {_owners("cser_implementation")}: 1 resets the errors; 2 averages the
        selected part of the models; released is 2 as the authors' code has it, where the message of
        a reset takes the place of that of its step.""",
    )
    decay_outside_compressor: bool = _compression(
        False,
        """In ef_sgd and qsparse_local_sgd: weight decay moves the common model, with a momentum of
        its own, and is in no message. By default it is a part of the updates, and what a compressor
        leaves of it arrives late.""",
    )
    error_decay: float | None = _compression(
        None,
        f"In {_owners('error_decay')}: factor by which a round shrinks the residual.",
    )
