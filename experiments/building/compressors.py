"""From flags to the compressors of a method, and its compression ratio by the papers' formula."""

import math

from experiments.building.config import Config
from jaxlocal import ConfigurationError
from jaxlocal.compression import parse
from jaxlocal.methods import METHODS
from jaxlocal.types import Compressor

FLAGS = ("gradient", "reset", "sync")


def make_compressors(config: Config) -> dict[str, Compressor]:
    """The compressors of a method by what they compress: "gradient", "reset" or "sync".

    Raises:
      ConfigurationError: a flag that the method does not use, or a spec string that
        `compression.parse` cannot read.
    """
    names = {what: getattr(config, f"{what}_compressor") for what in FLAGS}
    has = METHODS[config.method].compressors
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
    """Compression ratio R_C = 1 / (1/R_C2 + 1/(R_C1·H)) over data parallelism, as papers count it.

    Messages of C2 are sent at every step, those of C1 at the end of a round of H steps, in the
    released implementation of CSER in the place of that step's: there R_C = H / ((H−1)/R_C2 +
    1/R_C1). Indices, and tensors too small to compress, are not counted. None for methods on
    networks of hubs, and for compressors without a nominal ratio.

    >>> from jaxlocal.compression import grbs
    >>> cser = {"gradient": grbs(64), "reset": grbs(4)}
    >>> ratio_by_formula(Config(method="cser"), cser, steps_a_round=16)
    32.0
    >>> released = Config(method="cser", cser_implementation="released")
    >>> round(ratio_by_formula(released, cser, steps_a_round=16), 3)  # 16 / (15/64 + 1/4)
    33.032
    """
    if METHODS[config.method].network:
        return None
    kinds = METHODS[config.method].compressors or ("sync",)
    ratios = {what: compressors[what].ratio if what in compressors else 1.0 for what in kinds}
    a_step = 1 - 1 / steps_a_round if config.cser_implementation == "released" else 1
    messages = {"gradient": a_step}  # in a step
    sent = sum(messages.get(what, 1 / steps_a_round) / ratio for what, ratio in ratios.items())
    if math.isnan(sent):
        return None
    return 1 / sent if sent else math.inf


def _not_for(method: str, what: str, name: str) -> str:
    flag = f"--{what}_compressor={name}"
    own = " and ".join(f"--{other}_compressor" for other in METHODS[method].compressors)
    if own:
        return f"{flag} is not for {method}, whose messages are compressed by {own}"
    others = ", ".join(other for other, spec in METHODS.items() if what in spec.compressors)
    return f"{flag} is not for {method}, which sends whole models; it is for {others}"
