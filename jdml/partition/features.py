"""Features divided over workers: each has its columns of X and their coordinates of w.

What then travels are partial margins ``X_k w_k [n]``, summed over workers. Contiguous blocks are
slices, and dense columns all cost alike; of sparse ones, the cost is the non-zeros.
"""

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse

from jdml.partition.divisions import Indices, check_division, checked_weights, contiguous


def contiguous_features(
    num_features: int, num_workers: int, nonzeros: npt.ArrayLike | None = None
) -> list[Indices]:
    """Blocks of neighbouring columns: as :func:`contiguous` of samples, weighted by non-zeros.

    Args:
      num_features: d.
      num_workers: 1 <= K <= d.
      nonzeros: ``[num_features]`` (:func:`nonzeros_of_columns`); blocks then have about as many
        each, the fullest at most the mean and one column's. Without: as many columns each, within
        one.

    Raises:
      ValueError: more workers than features, or counts that are none.
    """
    check_division("contiguous_features", "features", num_features, num_workers)
    if nonzeros is not None:
        nonzeros = checked_weights("contiguous_features", "features", nonzeros, num_features)
    return contiguous(num_features, num_workers, nonzeros)


def balanced_features(nonzeros: npt.ArrayLike, num_workers: int) -> list[Indices]:
    """Columns dealt so that workers have the same number of non-zeros, nearly.

    The fullest column that is left goes to who has the fewest non-zeros. The fullest worker then
    has at most ``4/3 - 1/(3K)`` times what the best division gives it, and exceeds nobody by more
    than one of its columns. Empty columns even out the counts.

    Args:
      nonzeros: ``[num_features]``, the non-zeros of each column (:func:`nonzeros_of_columns`) or
        any other cost >= 0.
      num_workers: 1 <= K <= num_features.

    Returns:
      For each worker its column numbers, int64, ascending; everybody has at least one.

    Raises:
      ValueError: more workers than features, or counts that are none.

    Reference: Graham, "Bounds on multiprocessing timing anomalies", 1969 (largest first).
    """
    costs = np.asarray(nonzeros)
    if costs.ndim != 1:
        raise ValueError(
            f"balanced_features: counts of shape {costs.shape}; expected [num_features]."
        )
    check_division("balanced_features", "features", len(costs), num_workers)
    costs = checked_weights("balanced_features", "features", costs, len(costs))
    order = np.argsort(-costs, kind="stable")
    num_full = int(np.count_nonzero(costs))
    owner = np.empty(len(costs), np.int64)
    least = [(0.0, 0, k) for k in range(num_workers)]
    for column in order[:num_full].tolist():
        load, count, k = least[0]
        owner[column] = k
        heapq.heapreplace(least, (load + float(costs[column]), count + 1, k))
    fewest = [(count, k) for _, count, k in least]
    heapq.heapify(fewest)
    for column in order[num_full:].tolist():
        count, k = fewest[0]
        owner[column] = k
        heapq.heapreplace(fewest, (count + 1, k))
    # A stable sort by owner leaves each worker's columns ascending.
    ends = np.cumsum(np.bincount(owner, minlength=num_workers))[:-1]
    return np.split(np.argsort(owner, kind="stable").astype(np.int64), ends)


def nonzeros_of_columns(rows: Any) -> Indices:
    """Non-zeros of each column of a SciPy sparse matrix or an array, int64 ``[num_features]``.

    An explicit zero of a sparse matrix counts: it is stored and multiplied.
    """
    if scipy.sparse.issparse(rows):
        csr = scipy.sparse.csr_array(rows)
        return np.bincount(csr.indices, minlength=csr.shape[1]).astype(np.int64)
    array = np.asarray(rows)
    if array.ndim != 2:
        raise ValueError(
            f"nonzeros_of_columns: shape {array.shape}; expected [samples, num_features]."
        )
    return np.count_nonzero(array, axis=0).astype(np.int64)
