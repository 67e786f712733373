"""A matrix product whose weight gradient is fast on CPU.

JAX derives the weight gradient `xᵀ g`, [in, out]. XLA:CPU has a fast kernel for it where x and g
are matrices, and a slow one where their rows have several dimensions, such as batch and length.
With few outputs it computes the same numbers up to three times faster as rows of the transpose,
`gᵀ x`, [out, in]. XLA folds a transposition into the product, so that a barrier has to keep the two
apart.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxlocal.nn.convolution import equally_varying

# Up to FEW outputs, gᵀ x and its transposition are faster than xᵀ g with any number of rows, and
# with MANY rows up to SOME outputs, or where inputs are twice as many; in half precision only the
# former. This was measured on CPU cores with AVX2 for 64 to 784 inputs, 4 to 512 outputs and 8 to
# 512 rows, and with AVX-512 for 64 to 2,048 inputs and 64 to 512 outputs.
FEW, SOME, MANY = 32, 112, 256


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
) -> jax.Array:
    """Matrix product as `jax.lax.dot_general`, with a weight gradient that is fast on CPU.

    Flax layers take it as an argument, in NNX and in Linen:
    `nnx.Linear(..., dot_general=dot_general)`.

    Fast is y = x W of x `[..., in]` and W `[in, out]`. All leading dimensions of x become one, that
    of its rows. With up to 32 outputs, or where x has 256 rows or more with up to 112, or with half
    as many as inputs, the derivative with respect to W is (gᵀ x)ᵀ instead of xᵀ g, on CPU. All
    other products run as in `jax.lax`. Values and gradients equal those of `jax.lax` up to the
    order of summation, in forward and reverse mode of any order. A policy of `jax.checkpoint` that
    saves products does not see those with few outputs.

    Args:
      lhs: x, `[..., in]`.
      rhs: W, `[in, out]`, of the same floating dtype.
      dimension_numbers, precision, preferred_element_type, out_sharding: as in `jax.lax`.

    Returns:
      The product, with the shape and dtype that `jax.lax` gives it.

    Raises:
      TypeError, ValueError: the same errors as `jax.lax.dot_general`.

    >>> x, weights = jnp.ones((8, 5)), jnp.ones((5, 3))
    >>> dot_general(x, weights, (((1,), (0,)), ((), ()))).shape
    (8, 3)
    """
    spec = jax.typeof(lhs).sharding.spec
    if out_sharding is None and not any(spec[1:]) and pays(lhs, rhs, dimension_numbers):
        precision = tuple(precision) if isinstance(precision, list) else precision
        rows = lhs.reshape(-1, lhs.shape[-1])
        product = _product if _few(rows, rhs) else _plain
        y = product(precision, preferred_element_type, *equally_varying(rows, rhs))
        return y.reshape(*lhs.shape[:-1], rhs.shape[1])
    return lax.dot_general(
        lhs,
        rhs,
        dimension_numbers,
        precision,
        preferred_element_type,
        out_sharding=out_sharding,
    )


def pays(lhs: Any, rhs: Any, dimension_numbers: Any) -> bool:
    """Whether `dot_general` has a faster weight gradient than `jax.lax`.

    Args:
      lhs, rhs: x and W, or their shapes and dtypes as `jax.ShapeDtypeStruct`.
      dimension_numbers: as in `jax.lax`.

    >>> pays(jnp.ones((8, 5)), jnp.ones((5, 3)), (((1,), (0,)), ((), ())))
    True
    """
    contracted, batched = dimension_numbers
    is_dense = (
        rhs.ndim == 2
        and [*map(tuple, contracted)] == [(lhs.ndim - 1,), (0,)]
        and not any(map(len, batched))
    )
    if not is_dense or lhs.dtype != rhs.dtype or not jnp.issubdtype(lhs.dtype, jnp.floating):
        return False
    rows = jax.ShapeDtypeStruct((math.prod(lhs.shape[:-1]), lhs.shape[-1]), lhs.dtype)
    return 0 not in (*lhs.shape, *rhs.shape) and (lhs.ndim > 2 or _few(rows, rhs))


def _few(rows: Any, weights: Any) -> bool:
    """Whether a layer has so few outputs that (gᵀ x)ᵀ is faster than xᵀ g."""
    (ins, outs), size = weights.shape, weights.dtype.itemsize
    known = isinstance(rows.shape[0], int)  # else it is a symbol of jax.export
    many = known and rows.shape[0] >= MANY and size >= 4
    few = outs <= FEW or (many and (outs <= SOME or 2 * outs <= ins))
    return few and size >= 2 and min(outs, ins) > 1


def _plain(precision: Any, result_type: Any, x: jax.Array, weights: jax.Array) -> jax.Array:
    """x W for x `[rows, in]` and W `[in, out]`."""
    return lax.dot_general(x, weights, (((1,), (0,)), ((), ())), precision, result_type)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _product(precision: Any, result_type: Any, x: jax.Array, weights: jax.Array) -> jax.Array:
    """x W, with a fast derivative with respect to W."""
    return _plain(precision, result_type, x, weights)


@partial(_product.defjvp, symbolic_zeros=True)
def _derivative(
    precision: Any, result_type: Any, primals: Sequence[Any], tangents: Sequence[Any]
) -> tuple[jax.Array, jax.Array]:
    """dx W + x dW, whose second term has the fast form as its transpose."""
    (x, weights), (dx, dweights) = primals, tangents
    product = partial(_product, precision, result_type)
    y = product(x, weights)
    terms = [] if isinstance(dx, SymbolicZero) else [product(dx, weights)]
    if not isinstance(dweights, SymbolicZero):
        fast = partial(_by_columns, precision, result_type)
        plain = partial(_plain, precision, result_type)
        terms.append(lax.platform_dependent(x, dweights, cpu=fast, default=plain))
    return y, sum(terms[1:], terms[0])


def _by_columns(precision: Any, result_type: Any, x: jax.Array, weights: jax.Array) -> jax.Array:
    """x W as the transpose of Wᵀ xᵀ; the transpose of it as a linear map of W is (gᵀ x)ᵀ."""
    columns = lax.optimization_barrier(weights.T)
    dims = (((1,), (1,)), ((), ()))
    if isinstance(precision, tuple):
        precision = precision[::-1]
    y = lax.dot_general(columns, x, dims, precision, result_type)
    return lax.optimization_barrier(y).T
