"""A worker larger than a device: how what it holds is split over the mesh axis `model`."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.collectives import workers_are_sharded
from jaxlocal.parallel.layout import MODEL
from jaxlocal.types import Tree

# (path, shape of one worker's leaf) -> which of its dimensions are split over "model"
Rule = Callable[[str, tuple[int, ...]], P]


def fsdp(devices: int, least: int = 1 << 10) -> Rule:
    """Every leaf split along its largest dimension that the devices divide, the first of equals.

    Leaves of fewer than `least` elements, and those of which the devices divide no dimension, stay
    whole on every device: a collective for them would cost more than it saves.

    >>> rule = fsdp(4)
    >>> [rule("", shape) for shape in ((64, 256), (256, 255), (49, 49), (256,))]
    [P(None, 'model'), P('model',), P(), P()]

    Source: as Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel",
    VLDB 2023, https://arxiv.org/abs/2304.11277, and ZeRO before them, keep parameters and
    optimizer states in parts.
    """

    def rule(path: str, shape: tuple[int, ...]) -> P:
        fits = [(-size, place) for place, size in enumerate(shape) if size % devices == 0]
        if not fits or math.prod(shape) < least:
            return P()
        return P(*(None,) * min(fits)[1], MODEL)

    return rule


def by_name(pairs: Iterable[tuple[str, P]]) -> Rule:
    """Every leaf split as the first pattern says that is found in its path.

    A path is that in the `TrainState`, as "params/blocks/0/up/kernel" or
    "opt_state/0/trace/blocks/0/up/kernel": the pattern of a parameter is found in all that an
    optimizer or a stage keeps of it too. Leaves of one element stay whole.

    Args:
      pairs: regular expressions, and which of the dimensions of one worker's leaf are split over
        "model". ("", P()) at the end leaves all others whole.

    Raises:
      ConfigurationError: by the rule, where no pattern is found in a path.

    >>> rule = by_name([("up/kernel", P(None, "model")), ("down/kernel", P("model")), ("", P())])
    >>> rule("params/0/up/kernel", (16, 64)), rule("opt_state/0/mu/0/down/kernel", (64, 16))
    (P(None, 'model'), P('model',))
    """
    known = list(pairs)

    def rule(path: str, shape: tuple[int, ...]) -> P:
        if math.prod(shape) == 1:
            return P()
        for pattern, spec in known:
            if re.search(pattern, path):
                return spec
        raise ConfigurationError(
            f"none of the patterns {[pattern for pattern, _ in known]} is found in {path}; "
            f'("", P()) at the end leaves the rest whole'
        )

    return rule


def shardings(mesh: Mesh, rule: Rule, specs: Any, tree: Tree) -> Tree:
    """Where every leaf of a tree (or of its shapes) lies.

    Args:
      specs: a prefix of the tree, how leading dimensions are spread over the axes of workers; the
        rule is asked about the others.

    Raises:
      ConfigurationError: what the rule says does not fit the leaf.
    """

    def part(prefix, spec, leaves):
        def one(path, x):
            if not is_sharded(mesh):
                return NamedSharding(mesh, spec)
            path, shape = path_name((*prefix, *path)), x.shape[len(spec) :]
            own = rule(path, shape)
            _check(path, shape, own, mesh.shape[MODEL])
            return NamedSharding(mesh, P(*spec, *own))

        return jax.tree_util.tree_map_with_path(one, leaves)

    return jax.tree_util.tree_map_with_path(part, specs, tree)


def with_shardings(shapes: Tree, shardings: Any) -> Tree:
    """The shapes with their shardings, a prefix of the tree."""

    def over(where, part):
        at = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        return jax.tree.map(at, part)

    return jax.tree.map(over, shardings, shapes)


def named_shardings(mesh: Mesh, specs: Any) -> Any:
    """The specs as shardings."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def batch_specs(mesh: Mesh, leading: P, batches: Tree) -> Any:
    """How batches lie whose examples follow the leading dimensions: split as well where they
    divide."""
    if not is_sharded(mesh):
        return leading
    place, parts = len(leading), mesh.shape[MODEL]

    def one(x):
        divides = x.ndim > place and x.shape[place] % parts == 0
        return P(*leading, MODEL) if divides else leading

    return jax.tree.map(one, batches)


def unshard(params: Tree) -> Tree:
    """The parameters, whole on every device: what a loss may say of those that it needs next."""
    return _held(params, lambda x: P())


def shard_examples(batch: Tree) -> Tree:
    """One worker's batch, leaves [batch, ...], split over its devices where it divides."""
    parts = jax.sharding.get_abstract_mesh().shape.get(MODEL, 1)
    return _held(batch, lambda x: P(MODEL) if x.ndim and x.shape[0] % parts == 0 else P())


def _held(tree: Tree, spec_of: Callable) -> Tree:
    if not workers_are_sharded():
        return tree
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, spec_of(x)), tree)


def is_sharded(mesh: Mesh) -> bool:
    """Whether a worker is spread over several devices."""
    return MODEL in mesh.axis_names


def path_name(path: tuple[Any, ...]) -> str:
    """A path as "params/first/kernel", alike for namedtuples, lists and dictionaries."""
    entries = (getattr(e, "key", getattr(e, "name", getattr(e, "idx", e))) for e in path)
    return "/".join(map(str, entries))


def _check(path: str, shape: tuple[int, ...], spec: P, devices: int) -> None:
    fits = len(spec) <= len(shape) and sum(axis is not None for axis in spec) <= 1
    for size, axis in zip(shape, spec, strict=False):
        fits &= axis is None or (axis in (MODEL, (MODEL,)) and size % devices == 0)
    if not fits:
        raise ConfigurationError(
            f"{path} of shape {shape} cannot be split as {spec} over the {devices} devices of "
            f"the mesh axis {MODEL!r}"
        )
