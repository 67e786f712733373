"""Sharding of workers that are larger than a device, over the mesh axis "model"."""

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
from jaxlocal.parallel.leaves import path_name
from jaxlocal.types import Tree

# (path, shape of one worker's leaf) -> which of its dimensions is sharded over "model"
Rule = Callable[[str, tuple[int, ...]], P]


def fsdp(devices: int, least: int = 1 << 10) -> Rule:
    """Shard every leaf along its largest dimension, as fully sharded data parallelism does.

    The dimension is the largest that the number of devices divides, the first of several equal
    ones. A leaf without such a dimension, or with fewer than `least` elements, is replicated on
    every device: a collective for it would cost more than it saves.

    Args:
      devices: how many devices hold one worker, the size of the mesh axis "model".
      least: the number of elements from which on a leaf is sharded.

    Returns:
      A rule (path, shape of one worker's leaf) → PartitionSpec, for `RoundFn(..., sharding=rule)`.

    >>> rule = fsdp(4)
    >>> [rule("", shape) for shape in ((64, 256), (256, 255), (49, 49), (256,))]
    [P(None, 'model'), P('model',), P(), P()]

    Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB
    2023, https://arxiv.org/abs/2304.11277.
    """

    def rule(path: str, shape: tuple[int, ...]) -> P:
        fits = [(-size, place) for place, size in enumerate(shape) if size % devices == 0]
        if not fits or math.prod(shape) < least:
            return P()
        return P(*(None,) * min(fits)[1], MODEL)

    return rule


def by_name(pairs: Iterable[tuple[str, P]]) -> Rule:
    """Shard every leaf by the first pattern that matches its path.

    Paths are those in the `TrainState`, such as "params/blocks/0/up/kernel" or
    "opt_state/0/trace/blocks/0/up/kernel", so that the pattern of a parameter matches the optimizer
    state and the memories of that parameter too. Leaves of one element are replicated.

    Args:
      pairs: regular expressions, searched for in the path, each with the PartitionSpec of one
        worker's leaf over "model". ("", P()) at the end replicates all other leaves.

    Returns:
      A rule (path, shape of one worker's leaf) → PartitionSpec, for `RoundFn(..., sharding=rule)`.

    Raises:
      ConfigurationError: from the rule, if no pattern matches a path.

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
            f'("", P()) at the end replicates all other leaves'
        )

    return rule


def shardings(mesh: Mesh, rule: Rule, specs: Any, tree: Tree) -> Tree:
    """Shardings of all leaves of a tree on a mesh.

    Args:
      mesh: as `make_mesh` gives it.
      rule: how one worker's leaf is sharded over "model", if the mesh has this axis.
      specs: how the leading dimensions are sharded over the axes of workers, a prefix of the tree.
      tree: arrays or their shapes.

    Returns:
      A tree of NamedSharding.

    Raises:
      ConfigurationError: the rule's PartitionSpec does not fit the leaf.

    >>> mesh = jax.sharding.AbstractMesh((1, 1, 2), ("hubs", "workers", "model"))
    >>> params = {"kernel": jax.ShapeDtypeStruct((1, 4, 64, 32), "float32")}
    >>> shardings(mesh, fsdp(2), P("hubs", "workers"), params)["kernel"].spec
    P('hubs', 'workers', 'model')
    """

    def part(prefix, spec, leaves):
        def one(path, x):
            if not is_sharded(mesh):
                return NamedSharding(mesh, spec)
            path, shape = path_name((*prefix, *path)), x.shape[len(spec) :]
            within = rule(path, shape)
            _check(path, shape, within, mesh.shape[MODEL])
            return NamedSharding(mesh, P(*spec, *within))

        return jax.tree_util.tree_map_with_path(one, leaves)

    return jax.tree_util.tree_map_with_path(part, specs, tree)


def with_shardings(shapes: Tree, shardings: Any) -> Tree:
    """Attach shardings, a prefix of the tree, to the shapes of arrays.

    >>> mesh = jax.sharding.AbstractMesh((1, 2), ("hubs", "workers"))
    >>> kernel = jax.ShapeDtypeStruct((1, 4, 3), "float32")
    >>> with_shardings(kernel, NamedSharding(mesh, P("hubs", "workers"))).sharding.spec
    P('hubs', 'workers')
    """

    def attach(sharding, part):
        one = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.tree.map(one, part)

    return jax.tree.map(attach, shardings, shapes)


def named_shardings(mesh: Mesh, specs: Any) -> Any:
    """Turn a tree of PartitionSpec into a tree of NamedSharding on a mesh.

    >>> mesh = jax.sharding.AbstractMesh((1, 2), ("hubs", "workers"))
    >>> named_shardings(mesh, {"kernel": P("hubs", "workers")})["kernel"].spec
    P('hubs', 'workers')
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def batch_specs(mesh: Mesh, leading: P, batches: Tree) -> Any:
    """Specs of batches: their examples are sharded over the devices of a worker where they divide.

    Args:
      mesh: as `make_mesh` gives it.
      leading: the spec of the dimensions before the examples.
      batches: arrays or their shapes, leaves [..., batch, ...].

    Returns:
      A prefix of the tree of batches, or a tree of the same structure.

    >>> mesh = jax.sharding.AbstractMesh((1, 1, 2), ("hubs", "workers", "model"))
    >>> batches = jax.ShapeDtypeStruct((10, 1, 4, 8, 3), "float32")  # [steps, D, N, batch, ...]
    >>> batch_specs(mesh, P(None, "hubs", "workers"), batches)
    P(None, 'hubs', 'workers', 'model')
    """
    if not is_sharded(mesh):
        return leading
    axis, devices = len(leading), mesh.shape[MODEL]

    def one(x):
        divides = x.ndim > axis and x.shape[axis] % devices == 0
        return P(*leading, MODEL) if divides else leading

    return jax.tree.map(one, batches)


def unshard(params: Tree) -> Tree:
    """Gather sharded parameters on every device of a worker, just before a loss uses them.

    Args:
      params: one worker's parameters, or those of one layer, inside a loss.

    Returns:
      The same values, replicated; where workers are not sharded, the parameters as they are.

    >>> unshard({"bias": 1.5})
    {'bias': 1.5}
    """
    return _constrain(params, lambda x: P())


def shard_examples(batch: Tree) -> Tree:
    """Shard the examples of one worker's batch over its devices, where they divide.

    Args:
      batch: leaves [batch, ...], inside a loss.

    Returns:
      The same values; where workers are not sharded, the batch as it is.

    >>> shard_examples({"targets": 1.5})
    {'targets': 1.5}
    """
    devices = jax.sharding.get_abstract_mesh().shape.get(MODEL, 1)
    return _constrain(batch, lambda x: P(MODEL) if x.ndim and x.shape[0] % devices == 0 else P())


def _constrain(tree: Tree, spec_of: Callable) -> Tree:
    if not workers_are_sharded():
        return tree
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, spec_of(x)), tree)


def is_sharded(mesh: Mesh) -> bool:
    """Whether the workers on a mesh are sharded over several devices each.

    >>> is_sharded(jax.sharding.AbstractMesh((1, 1, 2), ("hubs", "workers", "model")))
    True
    """
    return MODEL in mesh.axis_names


def _check(path: str, shape: tuple[int, ...], spec: P, devices: int) -> None:
    fits = len(spec) <= len(shape) and sum(axis is not None for axis in spec) <= 1
    for size, axis in zip(shape, spec, strict=False):
        fits &= axis is None or (axis in (MODEL, (MODEL,)) and size % devices == 0)
    if not fits:
        raise ConfigurationError(
            f"{path} of shape {shape} cannot be sharded as {spec} over the {devices} devices of "
            f"the mesh axis {MODEL!r}"
        )
