"""Calls of an optimizer: the extra arguments that it is given, and what it may give back.

The code of optax does not keep to the strict modes of JAX, `jax_numpy_dtype_promotion="strict"` and
`jax_numpy_rank_promotion="raise"`, and runs here without them.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.leaves import check_same
from jaxlocal.types import Tree

# How an optimizer says that it does not take an argument, or that it lacks one.
_REFUSED = re.compile(r"got an unexpected keyword argument '(\w+)'")
_MISSED = re.compile(r"missing \d+ required keyword-only arguments?: (.*)|^(\w+) must be provided")


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Run code of optax, whatever strict mode of JAX the caller is in.

    >>> with jax.numpy_dtype_promotion("strict"), lenient():
    ...     float(0.5 * jax.numpy.int32(3))
    1.5
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def init_of(optimizer: optax.GradientTransformation, params: Tree) -> Tree:
    """The state of an optimizer before its first step."""
    with lenient():
        return optimizer.init(params)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """params + updates, in the dtypes of the parameters."""
    with lenient():
        return optax.apply_updates(params, updates)


def update_of(optimizer: optax.GradientTransformation, what: str = "optimizer") -> Callable:
    """The update of an optimizer, which may take any of the extra arguments that a stage knows.

    Args:
      optimizer: any optax transformation. It is given the extra arguments that it takes.
      what: what it is, for errors.

    Returns:
      `update(gradients, state, params, **known)` → (updates, state). It raises ConfigurationError
      where the optimizer needs an argument that is not known, or where updates or the state are not
      like those before them: an update of shape [1] would spread over a whole parameter.

    Raises:
      ConfigurationError: it is no optimizer.

    >>> update = update_of(optax.scale(-0.5))
    >>> update({"w": 1.0}, optax.EmptyState(), {"w": 3.0}, step=7)[0]
    {'w': -0.5}
    """
    if not (callable(getattr(optimizer, "init", None)) and hasattr(optimizer, "update")):
        raise ConfigurationError(f"the {what} must be one of optax, got {optimizer!r}")
    takes_extra = _takes_extra(optimizer)

    def update(grads, state, params, **known):
        given = dict(known) if takes_extra else {}
        with lenient():
            updates, after = _call(optimizer, what, given, known, grads, state, params)
        check_same(f"the updates of the {what}", "its parameters", params, updates, False)
        check_same(f"the state of the {what}", "the one before", state, after)
        return updates, after

    return update


def _takes_extra(optimizer: Any) -> bool:
    if isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return True
    # `optax.MultiSteps` passes them on, though it has another type.
    parameters = inspect.signature(optimizer.update).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def _call(optimizer, what, given, known, grads, state, params):
    """The update, by as many of the arguments as it takes; some, such as SAM, refuse others."""
    while True:
        try:
            return optimizer.update(grads, state, params, **given)
        except (TypeError, ValueError) as error:
            refused, missed = (pattern.search(str(error)) for pattern in (_REFUSED, _MISSED))
            if refused and given.pop(refused[1], None) is not None:
                continue
            if missed is None:
                raise
            raise ConfigurationError(_needs(what, missed[1] or missed[2], known)) from error


def _needs(what: str, missed: str, known: dict[str, Any]) -> str:
    if re.findall(r"\w+", missed)[0] in known:
        return f"a part of the {what} needs {missed}, and another part of it does not take that"
    return (
        f"the update of the {what} needs {missed}, and here it can be given only "
        f"{', '.join(sorted(known))}"
    )
