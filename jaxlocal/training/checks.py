"""Whether a method, its rounds and its batches fit together."""

import numbers
from typing import Any

import jax
import numpy as np

from jaxlocal.errors import ConfigurationError, check_integer
from jaxlocal.parallel.layout import Layout
from jaxlocal.parallel.leaves import check_fits, is_key, path_name
from jaxlocal.periods.rounds import length_at
from jaxlocal.types import Method, Period, Tree

MOST_STEPS = 2**31 - 1  # what `state.step`, an int32, counts to


def check_method(method: Method, layout: Layout) -> None:
    """Raise ConfigurationError where these do not make rounds."""
    if not isinstance(method, Method) or not isinstance(layout, Layout):
        raise ConfigurationError(
            f"a RoundFn is made of a method and a jaxlocal.Layout, got {type(method).__name__} and "
            f"{type(layout).__name__}"
        )
    if not isinstance(method.period, Period):
        raise ConfigurationError(
            f"the period of a method must be a rule, such as jaxlocal.periods.of(4), got "
            f"{method.period!r}"
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


def most_at_once(method: Method, max_chunk: int) -> int:
    """How many inner stages are dispatched at once, of a bound in steps."""
    check_integer("max_chunk", max_chunk)
    return max(1, max_chunk // method.inner.steps)


def check_no_shapes(tree: Tree) -> None:
    """Raise ConfigurationError where shapes stand for arrays that a program is to read."""
    if jax.ShapeDtypeStruct in set(map(type, jax.tree.leaves(tree))):
        raise ConfigurationError(
            "arrays are needed here, got shapes (jax.ShapeDtypeStruct), which are taken by "
            "round_fn.shapes, lower, message_bits and collectives"
        )


def check_model(params: Tree, model_state: Tree) -> None:
    """Raise ConfigurationError where these are not the parts of a model, or are swapped."""
    if not jax.tree.leaves(params):
        raise ConfigurationError(f"a model needs parameters, got no array in params = {params!r}")
    if is_key(model_state):
        raise ConfigurationError(
            "the model state is a key; the arguments are params, key and model_state, in this order"
        )


def check_length(method: Method, steps: int) -> None:
    """Raise ConfigurationError where a round has no steps before its end begins."""
    if steps <= method.outer.steps:
        raise ConfigurationError(
            f"a round of H = {steps} is too short: its end takes the last τ = {method.outer.steps} "
            f"steps, after at least one other"
        )


def check_period(method: Method, steps: int, step: int | None) -> None:
    """Raise ConfigurationError where a round is not as long as the method's period.

    Args:
      method: the method.
      steps: the steps of the round.
      step: at which the round starts; None where the host does not know it.
    """
    period, start = method.period, step or 0
    if step is None and not period.constant:
        raise ConfigurationError(
            f"the period of the method ({period.description}) depends on the step, which is not "
            f"known inside jax.jit; give length={steps} for a round of these {_counted(steps)}"
        )
    remaining = MOST_STEPS - start  # as `schedule` has it for a run that is long enough
    length, at = length_at(period, start, remaining), "" if step is None else f" at step {step}"
    if length >= remaining:
        raise ConfigurationError(
            f"the period of the method ({period.description}) lasts from step {start} until the "
            f"end of the run, which a round does not know; give length={steps} if it ends after "
            f"these {_counted(steps)}"
        )
    if length != steps:
        raise ConfigurationError(
            f"the batches hold {_counted(steps)}, and the period of the method "
            f"({period.description}) gives H = {length}{at}; give batches of {length}, or "
            f"length={steps} if you mean it"
        )


def check_given_length(length: Any, steps: int) -> None:
    """Raise ConfigurationError where batches do not hold the steps that a caller gives."""
    if not isinstance(length, numbers.Integral):
        raise ConfigurationError(
            f"the length of a round must be a Python integer, got {type(length).__name__}"
        )
    if length != steps:
        raise ConfigurationError(f"length is {length}, and the batches hold {_counted(steps)}")


def check_interval(what: str, steps: Any) -> None:
    """Raise ConfigurationError where a number of steps is not an integer of at least 0."""
    if not isinstance(steps, numbers.Integral):
        raise ConfigurationError(f"steps between {what} must be an integer, got {steps!r}")
    if steps < 0:
        raise ConfigurationError(f"steps between {what} must be ≥ 0, got {steps}")


def steps_of(batches: Tree, method: Method, layout: Layout) -> int:
    """The steps of some batches, whose leaves must be [steps, hubs, workers_per_hub, ...].

    Raises:
      ConfigurationError: other leading sizes, or a number of steps that is not a positive multiple
        of those of the inner stage.
    """
    steps = leading_size(batches, layout)
    if steps % method.inner.steps or not steps:
        raise ConfigurationError(
            f"a round of {steps} steps is not a positive multiple of the {method.inner.steps} of "
            f"its inner stage"
        )
    return steps


def leading_size(batches: Tree, layout: Layout) -> int:
    """The first size of batches, whose leaves must be arrays [steps, hubs, workers_per_hub, ...].

    Raises:
      ConfigurationError: other leading sizes, or leaves that are not numbers.
    """
    leaves = jax.tree.leaves(batches)
    leading = {np.shape(x)[:3] for x in leaves}
    if len(leading) != 1 or next(iter(leading))[1:] != layout.shape:
        raise ConfigurationError(
            f"batches must lead with [steps, {layout.hubs} hubs, {layout.workers_per_hub} workers],"
            f" got {_shapes_of(batches)}"
        )
    for x in leaves:
        if not is_key(x) and getattr(x.dtype, "kind", "") in "OSUMm":
            raise ConfigurationError(f"batches must be arrays of numbers, got one of {x.dtype}")
    check_fits("batches", batches)
    return next(iter(leading))[0]


def _counted(steps: int) -> str:
    return f"{steps} step{'s' * (steps != 1)}"


def _shapes_of(batches: Tree) -> str:
    """The different leading shapes of batches, each with the first leaf that has it."""
    first: dict[tuple[int, ...], str] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(batches):
        first.setdefault(np.shape(x)[:3], path_name(path))
    if not first:
        return "no array"
    names = ", ".join(name for _, name in sorted(first.items()) if name)
    named = f" in {names}" if names else ""
    lists = "; make arrays of lists and numbers" if () in first else ""
    return f"leading shapes {', '.join(map(str, sorted(first)))}{named}{lists}"
