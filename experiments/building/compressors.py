"""From flags to what compresses a method's messages, and what that makes of communication by the
papers' formula."""

import math

from experiments.building.config import Config
from experiments.building.schedules import HUB_METHODS
from jaxlocal import ConfigurationError
from jaxlocal.compression import parse
from jaxlocal.types import Compressor

# By method: the compressors that it has, with what they are where a flag is silent. A gradient's
# message is sent at every step, the others at the end of a round.
DEFAULTS: dict[str, dict[str, str | None]] = {
    "data_parallel": {"gradient": None},
    "ef_sgd": {"gradient": "grbs:32"},
    "qsparse_local_sgd": {"sync": "grbs:8"},
    "cser": {"gradient": "grbs:64", "reset": "grbs:4"},
    "csea": {"reset": "grbs:32"},
    "cser_pl": {"reset": "grbs:8"},
    "sparse_loco": {"sync": "top_k:64"},
    "mll_sgd": {"sync": None},
    "hl_sgd": {"sync": None},
}
FLAGS = ("gradient", "reset", "sync")


def make_compressors(config: Config) -> dict[str, Compressor]:
    """The compressors of a method by what they compress: "gradient", "reset" or "sync".

    Raises:
      ConfigurationError: a flag that the method has no use for, or that `compression.parse` cannot
        read.
    """
    names = {what: getattr(config, f"{what}_compressor") for what in FLAGS}
    has = DEFAULTS.get(config.method, {})
    for what, name in names.items():
        if name is not None and what not in has:
            raise ConfigurationError(_not_for(config.method, what, name))
    chosen = {
        what: default if names[what] is None else names[what] for what, default in has.items()
    }
    return {what: parse(name) for what, name in chosen.items() if name is not None}


def ratio_by_formula(
    config: Config, compressors: dict[str, Compressor], steps_a_round: float
) -> float | None:
    """R_C = 1 / (1/R_C2 + 1/(R_C1·H)): how much less is said than in data parallelism, as papers
    count it, without what small tensors and indices cost.

    C2 is said at every step, C1 at the end of a round of H steps. None for methods on networks of
    hubs and for compressors without a nominal ratio.

    >>> from jaxlocal.compression import grbs
    >>> cser = {"gradient": grbs(64), "reset": grbs(4)}
    >>> ratio_by_formula(Config(method="cser"), cser, steps_a_round=16)
    32.0
    """
    if config.method in (*HUB_METHODS, "cooperative_sgd"):
        return None
    ratios = {what: compressor.ratio for what, compressor in compressors.items()}
    if config.method == "data_parallel":
        ratios.setdefault("gradient", 1.0)
    elif config.method not in DEFAULTS:
        ratios["sync"] = 1.0  # whole models
    steps = {"gradient": 1}
    said = sum(1 / (ratio * steps.get(what, steps_a_round)) for what, ratio in ratios.items())
    if math.isnan(said):
        return None
    return 1 / said if said else math.inf


def _not_for(method: str, what: str, name: str) -> str:
    flag = f"--{what}_compressor={name}"
    own = " and ".join(f"--{other}_compressor" for other in DEFAULTS.get(method, {}))
    if own:
        return f"{flag} is not for {method}, whose messages are compressed by {own}"
    others = ", ".join(other for other, has in DEFAULTS.items() if what in has)
    return f"{flag} is not for {method}, which says whole models; it is for {others}"
