"""Whether a method, its rounds and its batches fit together."""

import jax
import jax.numpy as jnp

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.layout import Layout
from jaxlocal.types import Method, Tree


def check_method(method: Method, layout: Layout) -> None:
    """Raise ConfigurationError where these do not make rounds."""
    if not isinstance(method, Method) or not isinstance(layout, Layout):
        raise ConfigurationError(
            f"a RoundFn is made of a method and a jaxlocal.Layout, got {type(method).__name__} and "
            f"{type(layout).__name__}"
        )
    inner, outer = method.inner, method.outer
    if outer.steps % inner.steps:
        raise ConfigurationError(
            f"the end of a round takes {outer.steps} steps, which is not a multiple of the "
            f"{inner.steps} of the inner stage"
        )
    if inner.turns > 1:
        raise ConfigurationError(
            f"an inner stage must send the same messages at every application, and this one takes "
            f"{inner.turns} turns; repeat it {inner.turns} times, or let it end rounds"
        )


def check_length(method: Method, steps: int) -> None:
    """Raise ConfigurationError where a round has no steps before its end begins."""
    if steps <= method.outer.steps:
        raise ConfigurationError(
            f"a round of H = {steps} is too short for a synchronisation that is overlapped with "
            f"its last τ = {method.outer.steps} steps"
        )


def steps_of(batches: Tree, method: Method, layout: Layout) -> int:
    """The steps of some batches, whose leaves must be [steps, hubs, workers_per_hub, ...].

    Raises:
      ConfigurationError: other leading sizes, or a number of steps that is not a positive multiple
        of those of the inner stage.
    """
    leading = {jnp.shape(x)[:3] for x in jax.tree.leaves(batches)}
    if len(leading) != 1 or next(iter(leading))[1:] != layout.shape:
        raise ConfigurationError(
            f"batches must lead with [steps, {layout.hubs} hubs, {layout.workers_per_hub} workers],"
            f" got leading shapes {sorted(leading)}"
        )
    steps = next(iter(leading))[0]
    if steps % method.inner.steps or not steps:
        raise ConfigurationError(
            f"a round of {steps} steps is not a positive multiple of the {method.inner.steps} of "
            f"its inner stage"
        )
    return steps
