"""PowerSGD: a matrix is sent as two low-rank factors."""

import dataclasses
import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlocal.compression.arrays import (
    add,
    common_dtype,
    is_floating,
    split,
    tree_bits,
    wide,
)
from jaxlocal.compression.batches import batches_by_shape, over_batch, stack, unstack
from jaxlocal.errors import ConfigurationError
from jaxlocal.types import Compressor, Leaf, SecondMessage, Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """A factor of each matrix of one shape."""

    values: Leaf  # [matrices, n, r]
    leaves: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # their numbers


def powersgd(rank: int) -> Compressor:
    """Compress matrices to rank r by one warm-started step of a power iteration, as PowerSGD does.

        first message:   P ← M Q;   P ← orthonormal basis of the columns of the average of P
        second message:  R ← Mᵀ P
        C(M) = P Rᵀ, a projection of M;  Q ← the average of R

    A tensor of two dimensions or more is a matrix M [n, m], where m is its last dimension. A tensor
    that P [n, r] and R [m, r] would not make smaller is sent uncompressed, in the second message. Q
    starts Gaussian, the same on all workers and in all runs. A column of P is zero if it depends on
    those before it up to rounding, as where the matrix has a lower rank than r. R is zero there
    too, and the column of Q is drawn again. C is linear in M once P is known, so that the average
    of payloads is the payload of the average.

    δ = r / min(n, m) for a first message, in expectation over Q, if all workers have the same M.
    Proof: with M = U Σ Vᵀ, the share of the i-th singular direction that is kept is the leverage of
    row i of Σ VᵀQ. It grows with σ_i and falls with the other σ_j, and the rows of VᵀQ have the
    same distribution: the larger σ_i, the larger its expectation w_i. Leverages sum to r, hence
    E‖C(M)‖² = Σ w_i σ_i² ≥ r / min(n, m) · Σ σ_i², by Chebyshev's sum inequality. If the workers'
    M differ, the bound holds for their average.

    Args:
      rank: r ≥ 1.

    Returns:
      The compressor `powersgd:RANK`. Its memory is Q, and it sends two messages.

    Raises:
      ConfigurationError: a rank below 1; at init, a rank above every matrix of the tree, or one at
        which no matrix becomes smaller.

    >>> from jaxlocal.compression import payload_bits
    >>> payload_bits(powersgd(2), {"w": jnp.zeros((30, 20)), "b": jnp.zeros(20)})
    3840

    These are P, R and b, (60 + 40 + 20) · 32.

    Source: Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for
    Distributed Optimization", NeurIPS 2019, https://arxiv.org/abs/1905.13727.
    """
    if not isinstance(rank, numbers.Integral) or isinstance(rank, bool) or rank < 1:
        raise ConfigurationError(f"the rank of powersgd must be an integer ≥ 1, got {rank!r}")

    def init(like):
        leaves = jax.tree.leaves(like)
        _check(rank, leaves)
        fitting = [i for i, x in enumerate(leaves) if _fits(x, rank)]
        batches = batches_by_shape(
            [jax.ShapeDtypeStruct(_shape(leaves[i]), wide(leaves[i].dtype)) for i in fitting]
        )
        numbers = [tuple(fitting[i] for i in batch) for batch in batches]
        return [
            Factors(jnp.stack([_start(i, leaves[i], rank) for i in batch]), batch)
            for batch in numbers
        ]

    def delta(like):
        shapes = [_shape(x) for x in jax.tree.leaves(like) if _fits(x, rank)]
        return min((rank / min(shape) for shape in shapes), default=1.0)

    return Compressor(
        name=f"powersgd:{rank}",
        init=init,
        encode=lambda tree, memory, key: {"left": _products(_left, tree, memory)},
        decode=_decode,
        delta=delta,
        ratio=math.nan,
        averageable=True,
        shared_mask=False,
        unbiased=False,
        granularity="tensor",
        second=SecondMessage(_settle, _encode_right, _remember),
    )


def _settle(average: Tree) -> Tree:
    """Orthonormalise all factors, those of one shape together, which compiles once."""
    factors = average["left"]
    columns = [factor.values for factor in factors]
    kinds = dict.fromkeys((x.shape[1:], x.dtype) for x in columns)
    bases = dict[int, Leaf]()
    for kind in kinds:
        same = [i for i, x in enumerate(columns) if (x.shape[1:], x.dtype) == kind]
        together = jax.vmap(_basis)(jnp.concatenate([columns[i] for i in same]))
        ends = np.cumsum([len(columns[i]) for i in same])
        bases |= zip(same, jnp.split(together, ends[:-1]), strict=True)
    return {"left": [Factors(bases[i], factor.leaves) for i, factor in enumerate(factors)]}


def _basis(columns: Leaf) -> Leaf:
    """Orthonormalise columns, [n, r] → [n, r], to zero where one depends on those before it.

    In exact arithmetic nothing would be left of such a column. What is left is rounding, which
    differs from device to device, and its direction must not be sent as if it meant anything.
    """
    basis, triangle = jnp.linalg.qr(columns)
    rotation, independent = _gram_schmidt(triangle)
    return jnp.where(independent.all(), basis, _dot(basis, rotation))


def _gram_schmidt(columns: Leaf) -> tuple[Leaf, Leaf]:
    """Orthonormalise columns [r, r] in turn, those that depend on the ones before to zero; also
    which of them do not.

    A column depends on others if at most √ε of its norm is left, ε of its square: the others then
    hold all of its square up to rounding. They are taken out twice, and are orthogonal after that.
    """
    largest = jnp.abs(columns).max(axis=0, keepdims=True)  # squares of small values would vanish
    columns = columns / jnp.where(largest == 0, 1, largest)
    least = math.sqrt(jnp.finfo(columns.dtype).eps)

    def step(basis, column):
        left = column - _dot(basis, _dot(basis.T, column))
        left = left - _dot(basis, _dot(basis.T, left))
        norm = jnp.linalg.norm(left)
        dependent = norm <= least * jnp.linalg.norm(column)  # nan is not, and stays
        unit = jnp.where(dependent, 0, left / jnp.where(dependent, 1, norm))
        return jnp.concatenate([basis[:, 1:], unit[:, None]], axis=1), ~dependent

    return lax.scan(step, jnp.zeros_like(columns), columns.T)


def _encode_right(tree: Tree, known: Tree, key: Leaf) -> Tree:
    compressed = {i for factors in known["left"] for i in factors.leaves}
    leaves = enumerate(jax.tree.leaves(tree))
    uncompressed = [None if i in compressed else x for i, x in leaves]
    return {"right": _products(_right, tree, known["left"]), "uncompressed": uncompressed}


def _remember(memory: Tree, payload: Tree, key: Leaf) -> Tree:
    """Q ← R, with new random columns where R is zero: from a zero column nothing would be found."""

    if not (rights := [factors.values for factors in payload["right"]]):
        return []
    dtype = common_dtype(rights)
    fresh = split(jax.random.normal(key, (sum(x.size for x in rights),), dtype), rights)

    def renewed(right, fresh):
        return jnp.where((right != 0).any(axis=1, keepdims=True), right, fresh)

    pairs = zip(payload["right"], map(renewed, rights, fresh), strict=True)
    return [Factors(values, factors.leaves) for factors, values in pairs]


def _decode(payload: Tree, key: Leaf, onto: Tree, scale: float) -> Tree:
    leaves, structure = jax.tree.flatten(onto)
    pairs = zip(leaves, payload["uncompressed"], strict=True)
    leaves = [x if whole is None else add(x, whole, scale) for x, whole in pairs]
    product = over_batch(lambda left, right: _dot(left, right.T))
    for left, right in zip(payload["left"], payload["right"], strict=True):
        for i, move in zip(left.leaves, unstack(product(left.values, right.values)), strict=True):
            leaves[i] = add(leaves[i], move.reshape(leaves[i].shape), scale)
    return jax.tree.unflatten(structure, leaves)


def _products(product: Callable, tree: Tree, factors: list[Factors]) -> list[Factors]:
    """product(matrix, factor) for every matrix that has a factor."""
    leaves = jax.tree.leaves(tree)

    def one(own):
        matrices = stack([_matrix(leaves[i]) for i in own.leaves])
        return Factors(over_batch(product)(matrices, own.values), own.leaves)

    return list(map(one, factors))


def _left(matrix: Leaf, right: Leaf) -> Leaf:
    return _dot(matrix, right)


def _right(matrix: Leaf, left: Leaf) -> Leaf:
    return _dot(matrix.T, left)


def _dot(a: Leaf, b: Leaf) -> Leaf:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _shape(x: Leaf) -> tuple[int, int]:
    """The shape of the matrix that a tensor is."""
    return math.prod(x.shape[:-1]), x.shape[-1]


def _matrix(x: Leaf) -> Leaf:
    return x.reshape(_shape(x)).astype(wide(x.dtype))


def _start(number: int, x: Leaf, rank: int) -> Leaf:
    key = jax.random.fold_in(jax.random.key(0), number)
    return jax.random.normal(key, (x.shape[-1], rank), wide(x.dtype))


def _fits(x: Leaf, rank: int) -> bool:
    """Whether two factors take fewer bits than the tensor."""
    if not is_floating(x) or len(x.shape) < 2:
        return False
    factors = jax.ShapeDtypeStruct((sum(_shape(x)), rank), wide(x.dtype))
    return tree_bits(factors) < tree_bits(x)


def _check(rank: int, leaves: list) -> None:
    floating = [x for x in leaves if is_floating(x) and x.size]
    sides = [min(_shape(x)) for x in floating if len(x.shape) > 1]
    if floating and max(sides, default=0) < rank:
        has = f"the largest has {max(sides)}" if sides else "the tree has no matrix"
        raise ConfigurationError(
            f"powersgd:{rank} needs a matrix of at least {rank} rows and columns, but {has}"
        )
    if floating and not any(_fits(x, rank) for x in floating):
        n, m = max((_shape(x) for x in floating if len(x.shape) > 1), key=min)
        raise ConfigurationError(
            f"powersgd:{rank} makes no matrix smaller: two factors of the largest, {n} × {m}, have "
            f"{rank * (n + m)} values for its {n * m}"
        )
