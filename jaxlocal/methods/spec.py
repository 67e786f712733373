"""What the table of methods records of each: `MethodSpec`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from jaxlocal.types import Method


class OuterDefault(NamedTuple):
    """The outer optimizer that a method has by default."""

    name: str
    make: Callable[[float, float], optax.GradientTransformation]  # of learning rate and momentum
    learning_rate: float
    momentum: float

    def build(self) -> optax.GradientTransformation:
        return self.make(self.learning_rate, self.momentum)


class MethodSpec(NamedTuple):
    """All that is known of a method besides its code: checks, defaults, help texts and documents
    are read off it."""

    build: Callable[..., Method]  # its arguments by name are its options
    summary: str  # what workers do, for tables
    source: str = ""  # a link, in Markdown
    period: str = "constant"  # the rule that its rounds follow where none is chosen
    own_period: bool = False  # whether it has no other rule
    every_step: bool = False  # whether H = 1
    # What is compressed ("gradient" at every step, "reset" or "sync" at the end of a round), and by
    # default how, as a spec string; None: sent uncompressed.
    compressors: Mapping[str, str | None] = {}
    outer_optimizer: OuterDefault | None = None
    network: str = ""  # what mixes over a graph: "hubs", "workers", or nothing
    own_options: Mapping[str, str] = {}  # flags that only this method has, and its arguments

    def takes(self, argument: str) -> bool:
        """Whether the method has an argument."""
        return argument in inspect.signature(self.build).parameters

    def default(self, argument: str) -> Any:
        """The default of an argument of the method."""
        return inspect.signature(self.build).parameters[argument].default


def momentum_sgd(learning_rate: float, momentum: float) -> optax.GradientTransformation:
    """SGD, with heavy-ball momentum where it is not 0."""
    return optax.sgd(learning_rate, momentum=momentum or None)


def nesterov_sgd(learning_rate: float, momentum: float) -> optax.GradientTransformation:
    """SGD with Nesterov's momentum."""
    return optax.sgd(learning_rate, momentum=momentum, nesterov=True)
