"""Kinds of leaves: what a train state may hold, and what becomes of it.

| leaf             | parameters | averages of model and optimizer states | `RoundFn.mean`  |
|------------------|------------|----------------------------------------|-----------------|
| float16, …, 64   | yes        | Σ_j W_ji x_j, in float32 at least      | the average     |
| float8, float4   | refused    | as float16                             | the average     |
| complex          | refused    | Σ_j W_ji x_j                           | the average     |
| bool, int, uint  | refused    | every worker keeps its own             | the largest     |
| typed random key | refused    | every worker keeps its own             | that of worker 0|
| text, objects    | refused    | refused                                |                 |

Any leaf may be a scalar or have no values at all. Numbers of Python and numpy arrays become arrays
of JAX, float64 only with `jax_enable_x64`. Averages come back in the leaf's own type. What is
compressed, and what the consensus distance is of, is the parameters. At `init` the random keys of
an optimizer state, typed or not, and the typed ones of a model state are folded with the number of
the worker, see `keys.own_keys`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlocal.errors import ConfigurationError
from jaxlocal.types import Leaf, Tree

_paths = jax.tree_util.tree_leaves_with_path


def is_key(x: Any) -> bool:
    """Whether a leaf holds typed random keys.

    >>> is_key(jax.random.key(0)), is_key(jax.random.PRNGKey(0))
    (True, False)
    """
    return jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key)


def is_averaged(x: Leaf) -> bool:
    """Whether a leaf is averaged over workers: real and complex floating-point numbers are.

    >>> is_averaged(jnp.ones(2, jnp.bfloat16)), is_averaged(jnp.int32(0))
    (True, False)
    """
    return jnp.issubdtype(x.dtype, jnp.inexact)


def wide(*dtypes: Any) -> np.dtype:
    """The type in which values of some types are computed: floating-point, of 32 bits at least.

    The promotion of the types and float32, for float8 and in JAX's strict mode too.

    >>> wide(jnp.bfloat16), wide(jnp.float8_e4m3fn), wide(jnp.complex64), wide(jnp.int32)
    (dtype('float32'), dtype('float32'), dtype('complex64'), dtype('float32'))
    >>> wide(jnp.float16, jnp.complex64), wide(jnp.bfloat16, jnp.float16)
    (dtype('complex64'), dtype('float32'))
    """
    keeps = lambda dtype: jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    kept = (dtype for dtype in map(np.dtype, dtypes) if keeps(dtype))
    return functools.reduce(np.promote_types, kept, np.dtype(np.float32))


def path_name(path: tuple[Any, ...]) -> str:
    """Write the path of a leaf as "params/first/kernel", through tuples, lists and dictionaries.

    >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"params": [{"bias": 1.5}]})
    >>> path_name(path)
    'params/0/bias'
    """
    entries = (getattr(e, "key", getattr(e, "name", getattr(e, "idx", e))) for e in path)
    return "/".join(map(str, entries))


def dtype_of(x: Any) -> Any:
    """The dtype that a leaf has as an array of JAX; None if it cannot be one.

    >>> dtype_of(np.ones(2)), dtype_of("text")
    (dtype('float32'), None)
    """
    if x is None or isinstance(x, Mapping | tuple | list):
        return None
    try:
        return x.dtype if is_key(x) else jax.dtypes.canonicalize_dtype(jnp.result_type(x))
    except (TypeError, ValueError):
        return None


def describe(x: Any) -> str:
    """A leaf's type and shape, such as "float32[3, 2]"; its class if it is no array of JAX.

    >>> describe(jnp.ones((3, 2))), describe(0.5), describe("text")
    ('float32[3, 2]', 'float32[]', 'str')
    """
    dtype = dtype_of(x)
    if dtype is not None:
        return f"{dtype}{list(jnp.shape(x))}"
    return type(x).__name__ + (f" of {x.dtype}" if isinstance(x, np.ndarray) else "")


def check_params(params: Tree) -> None:
    """Check that parameters are real floating-point numbers of at least 16 bits.

    Args:
      params: of one model or of all workers; arrays, numbers or shapes.

    Raises:
      ConfigurationError: one is of another kind.

    >>> check_params({"w": jnp.ones(3), "steps": jnp.int32(0)})
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: parameters must be real floating-point numbers of at least
    16 bits, and params/steps is int32[]; keep it in the model state
    """
    for path, x in _paths(params):
        if remedy := _why_not_trained(dtype_of(x)):
            raise ConfigurationError(
                f"parameters must be real floating-point numbers of at least 16 bits, and "
                f"{_named('params', path)} is {describe(x)}; {remedy}"
            )


def check_arrays(what: str, tree: Tree) -> None:
    """Check that the leaves of a tree are arrays or numbers.

    >>> check_arrays("model_state", {"name": "resnet"})
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: model_state/name must be an array or a number, got str
    """
    for path, x in _paths(tree):
        if dtype_of(x) is None:
            name = _named(what, path)
            raise ConfigurationError(f"{name} must be an array or a number, got {describe(x)}")
    check_fits(what, tree)


def check_fits(what: str, tree: Tree) -> None:
    """Check that integers of numpy fit the type that they have as arrays of JAX, which wraps them.

    Raises:
      ConfigurationError: they do not, without `jax_enable_x64`.

    >>> check_fits("batches", {"targets": np.array([3, 2**40])})
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: batches/targets from 3 to 1099511627776 do not fit int32
    """
    for path, x in _paths(tree):
        if not isinstance(x, np.ndarray | np.integer) or x.dtype.kind not in "iu" or not x.size:
            continue
        if (dtype := dtype_of(x)) == x.dtype:
            continue
        least, most, limits = int(x.min()), int(x.max()), np.iinfo(dtype)
        if least < limits.min or most > limits.max:
            raise ConfigurationError(
                f"{_named(what, path)} from {least} to {most} do not fit {dtype}"
            )


def check_same(what: str, like: str, before: Tree, after: Tree, precision: bool = True) -> None:
    """Check that a tree has the structure, shapes and dtypes of another one.

    Args:
      what: what it is, for the error.
      like: what it must be like.
      before: the tree that it must be like, arrays or their shapes.
      after: the tree.
      precision: whether real floating-point numbers must be of the same type.

    Raises:
      ConfigurationError: a leaf is missing, is one too many or has another shape or dtype.

    >>> check_same("the updates", "the parameters", {"w": jnp.ones(3)}, {"w": jnp.ones(1)})
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: the updates must be like the parameters: w is float32[3]
    there, and float32[1] here
    """
    trees: tuple[Any, Any] = jax.tree.structure(before), jax.tree.structure(after)
    if trees[0] == trees[1]:
        leaves = jax.tree.leaves(before), jax.tree.leaves(after)
        if all(_alike(x, y, precision) for x, y in zip(*leaves, strict=True)):
            return
    there, here = ({path_name(p): x for p, x in _paths(tree)} for tree in (before, after))
    for name in {**there, **here}:
        kinds = [describe(tree[name]) if name in tree else "nothing" for tree in (there, here)]
        same = name in there and name in here and _alike(there[name], here[name], precision)
        if not same:
            raise ConfigurationError(
                f"{what} must be like {like}: {name or 'the leaf'} is {kinds[0]} there, and "
                f"{kinds[1]} here"
            )
    raise ConfigurationError(
        f"{what} must be like {like}: the tree is {trees[0]} there, and {trees[1]} here"
    )


def _named(what: str, path: tuple[Any, ...]) -> str:
    return "/".join([what, path_name(path)]) if path else what


def _alike(one: Any, other: Any, precision: bool) -> bool:
    types = dtype_of(one), dtype_of(other)
    if any(dtype is None for dtype in types) or jnp.shape(one) != jnp.shape(other):
        return False
    real = all(jnp.issubdtype(dtype, jnp.floating) for dtype in types)
    return types[0] == types[1] or (real and not precision)


def _why_not_trained(dtype: Any) -> str:
    """What to do with a leaf that cannot be a parameter; nothing where it can."""
    if dtype is None:
        return "leave it out of the parameters"
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "hold its real and its imaginary parts as two arrays"
    if not jnp.issubdtype(dtype, jnp.floating):
        return "keep it in the model state"
    if jnp.finfo(dtype).bits < 16:
        return "hold it in bfloat16 at least, and cast it where the loss uses it"
    return ""
