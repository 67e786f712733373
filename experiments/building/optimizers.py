"""From flags to the optimizer of a worker and the outer optimizer."""

from collections.abc import Callable

import optax

import jaxlocal
from experiments.building.config import Config
from jaxlocal import ConfigurationError
from jaxlocal.errors import lookup
from jaxlocal.methods import METHODS


def make_optimizer(config: Config, schedule: Callable) -> optax.GradientTransformation:
    """The optimizer of a worker; its learning rate follows the steps of the run.

    It clips the gradient that it is given: in data parallelism that is the average.
    """
    decay = 0.0 if config.decay_outside_compressor else config.weight_decay
    chain = _directions(config.optimizer, config.momentum, decay)
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    return optax.chain(*clip, *chain, jaxlocal.scale_by_step(schedule))


def make_decay_optimizer(config: Config, schedule: Callable) -> optax.GradientTransformation | None:
    """The optimizer of `--decay_outside_compressor`: the part of the worker's updates that is due
    to weight decay; None without the flag.

    Raises:
      ConfigurationError: the method has no such option, there is no weight decay, or updates are
        not the sum of a part of the gradient and a part of the decay.
    """
    if not config.decay_outside_compressor:
        return None
    flag = "--decay_outside_compressor"
    owners = [name for name, spec in METHODS.items() if spec.takes("decay_optimizer")]
    if config.method not in owners:
        raise ConfigurationError(f"{flag} is for {' and '.join(owners)}, not for {config.method}")
    if not config.weight_decay:
        raise ConfigurationError(
            f"{flag} needs a --weight_decay above 0, got {config.weight_decay}"
        )
    momenta = {"sgd": config.momentum, "nesterov": config.momentum, "adamw": 0.0, "lion": 0.0}
    if config.optimizer not in momenta:
        raise ConfigurationError(
            f"{flag} is for the optimizers {', '.join(momenta)}, whose updates are a part of the "
            f"gradient and a part of the decay, not for {config.optimizer}"
        )
    name, momentum = config.optimizer, momenta[config.optimizer]
    chain = _directions(name if momentum else "sgd", momentum, config.weight_decay)
    return optax.chain(*chain, jaxlocal.scale_by_step(schedule))


def make_outer_optimizer(config: Config) -> optax.GradientTransformation | None:
    """The outer optimizer of the flags; None where the flags do not change that of the method.

    Raises:
      ConfigurationError: a momentum for an optimizer that has other parameters.
    """
    default = METHODS[config.method].outer_optimizer
    name, rate, beta = config.outer_optimizer, config.outer_learning_rate, config.outer_momentum
    if default is None or (name, rate, beta) == (None, None, None):
        return None
    if name not in (None, default.name, "sgd", "nesterov") and beta is not None:
        raise ConfigurationError(
            f"--outer_momentum={beta} is for sgd and nesterov, not for --outer_optimizer={name}"
        )
    rate = default.learning_rate if rate is None else rate
    beta = default.momentum if beta is None else beta
    if name in (None, default.name):
        return default.make(rate, beta)
    return optax.chain(*_directions(name, beta, 0.0), optax.scale(-rate))


def _directions(name: str, beta: float, weight_decay: float) -> tuple:
    """The transformations of an optimizer before the learning rate."""
    plain = optax.identity()
    decay = optax.add_decayed_weights(weight_decay) if weight_decay else plain
    momentum = optax.trace(beta) if beta else plain
    table = {
        "sgd": (decay, momentum),
        "nesterov": (decay, optax.trace(beta, nesterov=True)),
        "adam": (decay, optax.scale_by_adam()),
        "rmsprop": (decay, optax.scale_by_rms()),
        "adagrad": (decay, optax.scale_by_rss()),
        "adamw": (optax.scale_by_adam(), decay),
        "lion": (optax.scale_by_lion(), decay),
        "lamb": (optax.scale_by_adam(), decay, optax.scale_by_trust_ratio()),
    }
    return lookup("optimizer", name, table)
