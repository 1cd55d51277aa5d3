"""Coordinates divided into blocks, for models that are separable: block coordinate descent.

Gauss-Seidel visits one block after the other, each seeing what the last one did. Jacobi changes all
of them at once from the same margins, and must damp what they do together: by how much is told by
how many blocks a sample touches.
"""

from typing import Any

import numpy as np
import scipy.sparse

from jdml.partition.divisions import Indices, check_division
from jdml.partition.samples import permutation


def coordinate_blocks(
    num_coordinates: int, num_blocks: int, seed: int | None = None
) -> list[Indices]:
    """Blocks whose sizes differ by at most one: of neighbours or, with a seed, drawn at random.

    Random blocks spread columns that are alike over blocks. Where non-zeros are uneven,
    ``balanced_features`` gives blocks that cost alike.

    Args:
      num_coordinates: d.
      num_blocks: 1 <= B <= d.
      seed: ``0 <= seed < 2**64``; ``None``: neighbours.

    Returns:
      For each block its coordinates, int64, ascending.

    Raises:
      ValueError: more blocks than coordinates.
    """
    check_division(
        "coordinate_blocks", "coordinates", num_coordinates, num_blocks, 0 if seed is None else seed
    )
    if seed is None:
        return np.array_split(np.arange(num_coordinates, dtype=np.int64), num_blocks)
    parts = np.array_split(permutation(num_coordinates, seed, 0), num_blocks)
    return [np.sort(part) for part in parts]


def visits(num_blocks: int, epoch: int, seed: int = 0, order: str = "cyclic") -> Indices:
    """Which blocks a Gauss-Seidel epoch visits, one after the other: int64 ``[num_blocks]``.

    Args:
      num_blocks: B >= 1.
      epoch: >= 0.
      seed: ``0 <= seed < 2**64``.
      order: ``"cyclic"``: 0 … B-1; ``"permuted"``: each once, in an order drawn for the epoch.

    Raises:
      ValueError: an argument is out of its range.
    """
    if num_blocks < 1 or epoch < 0 or order not in ("cyclic", "permuted"):
        raise ValueError(
            f"visits(num_blocks={num_blocks}, epoch={epoch}, order={order!r}): expected at least "
            'one block, an epoch >= 0, and "cyclic" or "permuted".'
        )
    if order == "cyclic":
        return np.arange(num_blocks, dtype=np.int64)
    return permutation(num_blocks, seed, epoch)


def separability(rows: Any, blocks: list[Indices]) -> int:
    """ω: the most blocks that one sample touches, 1 <= ω <= B (0 of an empty matrix).

    ω = 1: the blocks do not meet, and Jacobi needs no damping. A dense matrix has ω = B.

    Args:
      rows: ``[num_samples, num_features]``, a SciPy sparse matrix or an array.
      blocks: Disjoint index sets of all columns.

    Raises:
      ValueError: the blocks are no division of the columns.
    """
    csr = scipy.sparse.csr_array(rows)
    num_columns = csr.shape[1]
    owner = np.full(num_columns, -1, np.int64)
    for k, block in enumerate(blocks):
        owner[block] = k
    if sum(map(len, blocks)) != num_columns or np.any(owner < 0):
        raise ValueError(
            f"separability: expected blocks in which each of {num_columns} columns occurs once; "
            f"they have {sum(map(len, blocks))} in all, {len(np.unique(np.concatenate(blocks)))} "
            "different ones."
        )
    row = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
    full = csr.data != 0
    touched = np.unique(row[full] * len(blocks) + owner[csr.indices[full]]) // len(blocks)
    return int(np.max(np.bincount(touched, minlength=1)))


def safe_damping(omega: int, num_blocks: int, num_parallel: int | None = None) -> float:
    """β in ``w += β Σ_b h_b`` that keeps every step of τ blocks at once a descent, in expectation.

    ``β = 1 / (1 + (ω - 1)(τ - 1) / max(1, B - 1))``, where h_b is what block b would do alone and
    the τ blocks are drawn uniformly. With τ = B, all blocks, it is ``1/ω`` and holds without the
    expectation; with τ = 1 it is 1.

    Args:
      omega: :func:`separability`.
      num_blocks: B.
      num_parallel: τ, 1 .. B; by default B.

    Raises:
      ValueError: an argument is out of its range.

    Reference: Richtárik & Takáč, "Parallel coordinate descent methods for big data optimization",
    2016, theorem 12 (the expected separable overapproximation of τ-nice sampling).
    """
    parallel = num_blocks if num_parallel is None else num_parallel
    if not 1 <= omega <= num_blocks or not 1 <= parallel <= num_blocks:
        raise ValueError(
            f"safe_damping(omega={omega}, num_blocks={num_blocks}, num_parallel={num_parallel}): "
            "expected 1 <= omega <= num_blocks and 1 <= num_parallel <= num_blocks."
        )
    return 1.0 / (1.0 + (omega - 1) * (parallel - 1) / max(1, num_blocks - 1))
