"""Orthonormal rows of many thin matrices at once, by Gram-Schmidt on their Gram matrices.

What is sequential happens on ``r × r`` matrices, those of all leaves stacked: whatever the rank,
each pass costs two products per matrix, and one small sum where the long dim is divided over a mesh
axis. (``benchmarks/orthogonalise.py`` has the alternatives: Householder's QR gathers such a matrix;
row by row, Gram-Schmidt sums for each.) A Gram matrix squares the condition number, so one pass,
which is Cholesky-QR, loses orthogonality with it; a second restores it up to 10^3, a third to 10^5.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jdml.communicate.wire import varying_axes

_UNRESOLVED = 1e-5
_DEAD = 1e-3
"""Squared length, of a unit row, that is left when those before it are taken out: under the first,
a Gram matrix in f32 hardly tells it from rounding, and it is left as it is for the next pass; under
the second, in the last pass, it is rounding."""


def orthonormal_rows(
    matrices: Sequence[jax.Array], num_batch_dims: Sequence[int]
) -> list[jax.Array]:
    """Matrices ``P`` with the span of the given rows; ``P P^T = 1`` but for dependent ones.

    A row that depends on those before it ends as zeros or, where rounding left a remainder, as the
    direction of that remainder: ``P^T P`` is a projection in any case, zeros give zeros, and a
    value that is not finite makes its whole matrix NaN.

    Args:
      matrices: f32 ``[*batch, r, *long]``, with one r for all; not empty.
      num_batch_dims: How many leading dims of each count its matrices.

    Reference: Fukaya et al., "Shifted Cholesky QR for Computing the QR Factorization of
    Ill-Conditioned Matrices", SIAM J. Sci. Comput. 2020 (three passes of Cholesky-QR; here small
    pivots are left for the next pass where they shift the diagonal).
    """
    batches = list(num_batch_dims)
    rows = [_to_unit_maximum(p, b) for p, b in zip(matrices, batches, strict=True)]
    for floor, keep in ((_UNRESOLVED, True), (_UNRESOLVED, True), (_DEAD, False)):
        grams = [
            product(p, p, b, range(b + 1, p.ndim), range(b + 1, p.ndim))
            for p, b in zip(rows, batches, strict=True)
        ]
        combinations = _gram_schmidt_of_all(grams, floor, keep)
        rows = [
            product(t, p, b, [b + 1], [b])
            for t, p, b in zip(combinations, rows, batches, strict=True)
        ]
    return rows


def unit_rows(p: jax.Array, num_batch_dims: int) -> jax.Array:
    """Rows of length 1 in the direction of those of ``[*batch, r, *long]``; zeros stay zeros."""
    p = _to_unit_maximum(p, num_batch_dims)
    squares = jnp.sum(p * p, axis=tuple(range(num_batch_dims + 1, p.ndim)), keepdims=True)
    return p / jnp.where(squares == 0, 1, jnp.sqrt(squares))


def product(
    a: jax.Array, b: jax.Array, num_batch_dims: int, a_dims: Sequence[int], b_dims: Sequence[int]
) -> jax.Array:
    """``[*batch, *rest of a, *rest of b]``, summed over ``a_dims`` with ``b_dims``, in full f32."""
    batch = tuple(range(num_batch_dims))
    return jax.lax.dot_general(
        a,
        b,
        ((tuple(a_dims), tuple(b_dims)), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _to_unit_maximum(p: jax.Array, num_batch_dims: int) -> jax.Array:
    """Each row divided by its absolute maximum, so that no square overflows or vanishes."""
    largest = jnp.max(jnp.abs(p), axis=tuple(range(num_batch_dims + 1, p.ndim)), keepdims=True)
    # XLA divides by multiplying with the inverse, which of the largest numbers is subnormal: zero.
    middle = jnp.where(largest > 2.0**64, 2.0**-64, jnp.where(largest < 2.0**-64, 2.0**64, 1.0))
    largest = largest * middle
    return (p * middle) / jnp.where(largest == 0, 1, largest)


def _gram_schmidt_of_all(grams: list[jax.Array], floor: float, keep: bool) -> list[jax.Array]:
    """:func:`_gram_schmidt` of ``[*batch, r, r]``, as few calls as JAX's types allow.

    Stacked on one that varies over more mesh axes, an array would no longer be known not to.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for i, gram in enumerate(grams):
        groups.setdefault(varying_axes(gram), []).append(i)
    out = list(grams)
    for members in groups.values():
        square = grams[members[0]].shape[-2:]
        stacked = jnp.concatenate([grams[i].reshape(-1, *square) for i in members])
        combinations = _gram_schmidt(stacked, floor, keep)
        start = 0
        for i in members:
            stop = start + math.prod(grams[i].shape[:-2])
            out[i] = combinations[start:stop].reshape(grams[i].shape)
            start = stop
    return out


def _gram_schmidt(gram: jax.Array, floor: float, keep: bool) -> jax.Array:
    """Lower-triangular ``T`` such that the rows of ``T P`` are orthonormal, where ``P P^T = gram``.

    Args:
      gram: f32 ``[num_matrices, r, r]``.
      floor: A unit row of which a smaller squared length is left is not normalised,
      keep: but left at that length; or replaced by zeros.
    """
    rank = gram.shape[-1]
    squares = jnp.diagonal(gram, axis1=1, axis2=2)
    inverse = jnp.where(squares < jnp.finfo(jnp.float32).tiny, 0, jax.lax.rsqrt(squares))
    gram = gram * inverse[:, :, None] * inverse[:, None, :]

    def orthogonalise(k: jax.Array, t: jax.Array) -> jax.Array:
        column = jax.lax.dynamic_index_in_dim(gram, k, 2, keepdims=False)
        overlaps = product(t, column, 1, [2], [1])
        row = (jnp.arange(rank) == k) - product(overlaps, t, 1, [1], [1])
        left = product(product(row, gram, 1, [1], [1]), row, 1, [1], [1])[:, None]
        gone = left <= floor
        row = jnp.where(gone, row if keep else 0, row / jnp.sqrt(jnp.where(gone, 1, left)))
        return jax.lax.dynamic_update_index_in_dim(t, row, k, 1)

    t = jax.lax.fori_loop(0, rank, orthogonalise, gram - gram)
    return t * inverse[:, None, :]
